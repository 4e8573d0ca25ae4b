"""A trained backbone for other tools: ONNX, timm's names, torchvision's names, plain weights.

Each file is read back as its user would read it, and compared with torch, before it appears. onnx, onnxruntime,
onnxscript and timm are imported here, where they are used, and nowhere else.

Legend: N images, C channels, P pixels of a side, D features.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino.augment import normalize
from dino.backbones import seeded_backbone
from dino.files import whole_file
from dino.pretrained import Pretrained
from dino.vision_transformer import NAMED_SIZES, VisionTransformer

OPSET = 20  # of ONNX: the first with GELU as one operator; onnxruntime reads it since 1.17
BATCHES = (1, 2, 5)  # sizes that are compared
TOLERANCE = 1e-4  # allowed difference, as share of the largest feature; rounding of fp32 makes some 1e-6
VIT_OF_TIMM = {name: f"{name}_patch16_224" for name in NAMED_SIZES}
TIMM_DEFAULTS = {"img_size": 224, "patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True}

Network = Callable[[Tensor], Tensor]  # images [N, C, P, P] -> features [N, D]


class Exported(NamedTuple):
    """What was written and seen to be right.

    Attributes:
        difference: The largest from torch, as share of the largest feature.
        load: Python that loads the file.
        size_px: Side of the images it takes.
    """

    difference: float
    load: str
    size_px: int


def export_onnx(model: Pretrained, path: str | Path, *, size_px: int | None = None) -> Exported:
    """Write an ONNX file: `images` float32 [N, C, P, P], pixels of 0..1, any N -> `features` float32 [N, D].

    Mean and std are in the graph: who forgets to normalise gets plausible nonsense. Sizes and facts stand in the
    file's metadata.

    Args:
        model: What `dino.load` gives.
        path: The file.
        size_px: Side P of the images, fixed in the file; default: the evaluation crop.

    Raises:
        ValueError: A package is missing, the size does not fit, or the file's features are not torch's.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    size_px = _fitting(model, size_px)
    network = _FromPixels(_at_size(model.backbone, size_px), model)
    example = torch.zeros(2, model.transform.channels, size_px, size_px)  # a batch of 1 would be taken as fixed
    with _quiet(), _told("this network cannot be written as ONNX"):
        graph = torch.export.export(network.eval(), (example,), dynamic_shapes=[{0: torch.export.Dim("N")}])
        program = torch.onnx.export(
            graph,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=[{0: "N"}],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's notes on source lines: paths of this machine
    program.model.metadata_props.update(_metadata(model, size_px))

    def read_back(file: Path) -> Network:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    with whole_file(path) as aside:
        program.save(aside, external_data=False)
        with _told("onnxruntime does not run the file"):
            difference = _compared(_FromPixels(model.backbone, model), read_back(aside), model, size_px)
    load = (
        f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}")\nsession.run(None, {{"images": images}})'
    )
    return Exported(difference, load, size_px)


def export_timm(model: Pretrained, path: str | Path, *, size_px: int | None = None) -> Exported:
    """Write a state dict (safetensors) that a network of timm takes; arguments and errors as for `export_onnx`."""
    _need("timm")
    import timm

    size_px = _fitting(model, size_px)
    backbone = _at_size(model.backbone, size_px)
    name, settings = _timm_arguments(model, backbone)
    if not timm.is_model(name):
        raise ValueError(f"timm has no {name}; choose --to onnx, torchvision or safetensors")
    written = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in settings.items())])
    load = f"import safetensors.torch, timm\nnetwork = timm.create_model({written})"
    return _export_weights(model, backbone, path, size_px, load, lambda: timm.create_model(name, **settings))


def export_torchvision(model: Pretrained, path: str | Path, *, size_px: int | None = None) -> Exported:
    """Write a state dict (safetensors) that a network of torchvision takes, its classifier left out."""
    import torchvision

    arch = model.facts["arch"]
    if arch["family"] != "torchvision":
        kind = "a ViT, which has other names there" if isinstance(model.backbone, VisionTransformer) else "timm's"
        raise ValueError(f"torchvision has no such network: this one is {kind}; choose --to timm, onnx or safetensors")
    if arch["in_chans"] != 3:
        raise ValueError(
            f"torchvision's {arch['name']} takes 3 channels, this one {arch['in_chans']}; choose --to timm, onnx or "
            "safetensors"
        )
    with torch.device("meta"):  # names alone
        named = torchvision.models.get_model(arch["name"], weights=None).named_modules()
    classifier = [name for name, module in named if isinstance(module, nn.Linear)][-1]

    def build() -> nn.Module:
        network: nn.Module = torchvision.models.get_model(arch["name"], weights=None)
        parent, _, last = classifier.rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
        return network

    load = (
        "import safetensors.torch, torch, torchvision\n"
        f'network = torchvision.models.get_model("{arch["name"]}")\nnetwork.{classifier} = torch.nn.Identity()'
    )
    return _export_weights(model, model.backbone, path, _fitting(model, size_px), load, build)


def export_safetensors(model: Pretrained, path: str | Path, *, size_px: int | None = None) -> Exported:
    """Write the weights alone under the network's own names; a ViT's are those of the official DINO files."""
    size_px = _fitting(model, size_px)
    backbone = _at_size(model.backbone, size_px)
    arch = model.facts["arch"] | ({"img_size": size_px} if isinstance(backbone, VisionTransformer) else {})
    load = f"import dino.backbones, safetensors.torch\nnetwork = dino.backbones.seeded_backbone({arch}, seed=0)"
    return _export_weights(model, backbone, path, size_px, load, lambda: seeded_backbone(arch, seed=0))


def _export_weights(
    model: Pretrained, backbone: nn.Module, path: str | Path, size_px: int, load: str, build: Callable[[], nn.Module]
) -> Exported:
    """Write a state dict, load it strictly into the network that `build` (`load`, in words) gives, and compare."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    facts = json.dumps(_metadata(model, size_px) | {"load": load}, sort_keys=True)  # one entry: bytes repeat
    with whole_file(path) as aside:
        save_file(weights, aside, metadata={"dino": facts})
        with torch.random.fork_rng(devices=[]):
            network = build().eval()
        try:
            network.load_state_dict(load_file(aside))
        except RuntimeError as problem:
            first = str(problem).splitlines()[1].strip()[:200]
            raise ValueError(
                f"the weights do not fit `{load}` ({first} ...): there it goes by other names; choose --to onnx"
            ) from problem
        difference = _compared(model.backbone, network, model, size_px)
    return Exported(difference, f'{load}\nnetwork.load_state_dict(safetensors.torch.load_file("{path}"))', size_px)


def _timm_arguments(model: Pretrained, backbone: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments of timm.create_model."""
    if not isinstance(backbone, VisionTransformer):
        arch = model.facts["arch"]
        any_size = {"dynamic_img_size": True} if getattr(backbone, "dynamic_img_size", False) else {}
        return arch["name"], {"num_classes": 0, "in_chans": arch["in_chans"]} | any_size
    ours = backbone.arch
    fitting = [name for name, size in NAMED_SIZES.items() if size.items() <= ours.items()]
    named = fitting[0] if fitting else "vit_small"
    defaults = TIMM_DEFAULTS | NAMED_SIZES[named]
    return VIT_OF_TIMM[named], {"num_classes": 0} | {
        name: ours[name] for name, default in defaults.items() if ours[name] != default
    }


class _FromPixels(nn.Module):
    """Pixels of 0..1 -> features: normalisation and the backbone in one network."""

    def __init__(self, backbone: nn.Module, model: Pretrained) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = model.transform.mean, model.transform.std

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(normalize(images, self.mean, self.std))
        return features


@torch.inference_mode()
def _compared(ours: Network, theirs: Network, model: Pretrained, size_px: int) -> float:
    """The largest difference of two networks on random images, as share of the largest feature.

    Raises:
        ValueError: It is more than TOLERANCE, or not a number.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in BATCHES:
        images = torch.rand(batch, model.transform.channels, size_px, size_px, generator=generator)
        expected, found = ours(images).float(), theirs(images)
        if found.shape != expected.shape:
            raise ValueError(f"read back, it gives {list(found.shape)} instead of {list(expected.shape)}; not written")
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:  # so that "not a number" fails too
            raise ValueError(
                f"read back, its features differ by {difference:.1e} of the largest (allowed: {TOLERANCE:.0e}) for "
                f"{batch} images; not written"
            )
        worst = max(worst, difference)
    return worst


def _at_size(backbone: nn.Module, size_px: int) -> nn.Module:
    """The same network for images of this size alone: a ViT's position embedding resampled once and for all."""
    if not isinstance(backbone, VisionTransformer):
        return backbone
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
        own = VisionTransformer(**{**backbone.arch, "img_size": size_px}).eval()
    weights = backbone.state_dict() | {"pos_embed": backbone.position_embedding(size_px, size_px)}
    own.load_state_dict(weights)
    return own.requires_grad_(False)


def _fitting(model: Pretrained, size_px: int | None) -> int:
    """The size of the images; refused if patches do not divide it."""
    size_px = model.transform.crop_px if size_px is None else size_px
    patch = getattr(model.backbone, "patch_size", 1) if isinstance(model.backbone, VisionTransformer) else 1
    if size_px < patch or size_px % patch:
        below = max(size_px // patch, 1) * patch
        raise ValueError(
            f"{size_px} px does not divide into patches of {patch} px; choose {below} or {below + patch} px"
        )
    return size_px


def _metadata(model: Pretrained, size_px: int) -> dict[str, str]:
    """What a user of the file must know, as texts."""
    transform = model.transform
    resize_px = round(size_px * transform.resize_px / transform.crop_px)
    facts: Mapping[str, Any] = {
        "images": f"{'grey' if transform.channels == 1 else 'RGB'}, short side resized to {resize_px} px (bicubic, "
        f"antialiased), centre crop of {size_px} px",
        "resize_px": resize_px,
        "crop_px": size_px,
        "channels": transform.channels,
        "mean": transform.mean,
        "std": transform.std,
        "arch": model.facts["arch"],
        "key": model.facts["key"],
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {', '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of onnx and onnxruntime, which are of many kinds, as one that says what."""
    try:
        yield
    except ValueError:
        raise
    except Exception as problem:
        raise ValueError(f"{what}: {str(problem).strip().splitlines()[0][:300]}") from problem


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about itself; what is wrong shows in the comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
