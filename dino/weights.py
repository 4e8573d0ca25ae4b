"""Weights to start from: official DINO files, our own, torchvision's and timm's; read without running any code.

A file holds student and teacher with their heads (a full checkpoint), or one backbone, which both then start from.
"""

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dino.backbones import build_backbone, seeded_backbone
from dino.checkpoint import FACTS, STATE_FORMAT, load_tensors
from dino.config import RANDOM_WEIGHTS, TORCHVISION
from dino.vision_transformer import NAMED_SIZES, VisionTransformer, position_resampling

Tensors = dict[str, Tensor]

CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "head_dist.")  # beginnings of their names: not needed here
NESTED = ("state_dict", "model", "model_state_dict")  # names under which files of others keep their tensors
SHOWN = 3  # keys that do not fit, in an error


class _Ignored:
    """Stands in for the settings (argparse.Namespace) of the reference's checkpoints: keeps nothing, does nothing."""

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Weights:
    """State dicts of student and teacher: `backbone.*`, and `head.*` where the file has them.

    Attributes:
        student: Of a file with one backbone, the same as teacher.
        teacher: Likewise.
        center: [1, K], if the file has it.
    """

    student: Tensors
    teacher: Tensors
    center: Tensor | None = None


def digest(path: str | Path) -> str | None:
    """The md5 of a file of weights; None for random ones.

    Raises:
        ValueError: No such file.
    """
    if str(path) == RANDOM_WEIGHTS:
        return None
    if not Path(path).is_file():
        raise ValueError(
            f"pretrain.initial_weights is {str(path)!r}: there is no such file; {RANDOM_WEIGHTS} needs none"
        )
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read_weights(path: str | Path) -> Weights:
    """Weights of a .pth or .safetensors file, whichever its name.

    Raises:
        ValueError: Not a file of weights, cut short, or one that holds more than tensors (none of its code runs).
    """
    path = Path(path)
    digest(path)  # that it is there
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: its download was cut short; fetch it again")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    for name in NESTED:
        if isinstance(content.get(name), Mapping):
            content = content[name]
    if isinstance(content.get("student"), Mapping) or isinstance(content.get("teacher"), Mapping):
        parts = [_wrapped(content[name]) for name in ("student", "teacher") if isinstance(content.get(name), Mapping)]
        loss = content.get("dino_loss")
        center = loss.get("center") if isinstance(loss, Mapping) else content.get("center")
        weights = Weights(parts[0], parts[-1], center if isinstance(center, Tensor) else None)
    else:
        one = _wrapped(content)
        weights = Weights(one, one)
    if not any(name.startswith("backbone.") for name in weights.teacher):
        raise ValueError(
            f"{path} holds no weights of a network, only {', '.join(map(repr, list(content)[:SHOWN])) or 'nothing'}"
        )
    return weights


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            ours = FACTS in (file.metadata() or {})
            tensors = {} if ours else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # a foreign file may break its reader in any way
        raise ValueError(f"{path} is no safetensors file, or it is cut short ({_first_line(error)})") from error
    if not ours:
        return tensors
    tensors, facts = load_tensors(path)
    if facts["format"] != STATE_FORMAT:
        return tensors
    parts = {
        part: {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
        for part in ("student", "teacher")
    }
    return {**parts, "center": tensors["center"]}


def _read_pickle(path: Path) -> dict[str, Any]:
    """By torch's reader of tensors and plain containers, which runs nothing that a pickle names."""
    try:
        with torch.serialization.safe_globals([(_Ignored, "argparse.Namespace")]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are not torch's: refused below, in our words
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words would advise to read it unsafely
        raise ValueError(
            f"{path} is no file of plain weights: it is damaged, or holds objects that could run code (none was run)"
        ) from error
    except Exception as error:  # a foreign file may break its reader in any way
        raise ValueError(f"{path} is no file of weights, or it is cut short ({_first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights of a network, but a {type(content).__name__}")
    return dict(content)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _wrapped(content: Mapping[str, Any]) -> Tensors:
    """A state dict with the names of MultiCropWrapper: `backbone.*` and `head.*`."""
    tensors = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if any(name.startswith("backbone.") for name in tensors):
        return tensors
    return {f"backbone.{name}": value for name, value in tensors.items()}


def fitting_backbone(weights: Mapping[str, Tensor], backbone: nn.Module, place: str) -> Tensors:
    """The state dict for a backbone; position embeddings of another grid are resampled, a classifier is left out.

    Args:
        weights: `backbone.*`, and others, which are not looked at.
        backbone: Whose names and shapes they must have.
        place: The file, to name in an error.

    Raises:
        ValueError: They do not fit, with the first names and shapes that don't, and the likely architecture.
    """
    found = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    expected = backbone.state_dict()
    kept = {name: t for name, t in found.items() if name in expected or not name.startswith(CLASSIFIERS)}
    if "pos_embed" in kept and "pos_embed" in expected:
        kept["pos_embed"] = resampled(kept["pos_embed"], expected["pos_embed"], backbone)
    wrong = [f"{name} is not in the file" for name in expected if name not in kept]
    wrong += [
        f"{name} is {list(kept[name].shape)} in the file, {list(expected[name].shape)} here"
        for name in expected
        if name in kept and kept[name].shape != expected[name].shape
    ]
    wrong += [f"{name} is in the file only" for name in kept if name not in expected]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{place} is of another network than pretrain.arch and the images' channels make: "
            f"{'; '.join(wrong[:SHOWN])}{more}. {likely_arch(found)}"
        )
    return {name: tensor.to(expected[name].dtype) for name, tensor in kept.items()}


def resampled(pos_embed: Tensor, like: Tensor, backbone: nn.Module) -> Tensor:
    """A position embedding [1, P + N, D] for the square grid of another, as the backbone resamples it; else itself.

    P are the tokens before the N patches: CLS, and registers in some of timm's networks.
    """
    if pos_embed.ndim != 3 or like.ndim != 3 or pos_embed.shape == like.shape or pos_embed.shape[2] != like.shape[2]:
        return pos_embed
    wanted = isqrt(like.shape[1])
    before = like.shape[1] - wanted**2
    patches = pos_embed.shape[1] - before
    grid = isqrt(max(patches, 0))
    if grid < 1 or grid**2 != patches:
        return pos_embed
    if not isinstance(backbone, VisionTransformer):
        from timm.layers import resample_abs_pos_embed  # timm's own: no other network here has such an embedding

        found: Tensor = resample_abs_pos_embed(pos_embed, [wanted, wanted], num_prefix_tokens=before)
        return found
    matrix = position_resampling(grid, wanted, wanted, pos_embed.dtype, pos_embed.device)
    return torch.cat([pos_embed[:, :before], (matrix @ pos_embed[0, before:])[None]], dim=1)


def likely_arch(tensors: Mapping[str, Tensor]) -> str:
    """In words the settings that these weights of a backbone want, if they can be recognised."""
    patches = tensors.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4 and "blocks.0.attn.qkv.weight" in tensors:
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        size = {"embed_dim": patches.shape[0], "depth": depth}
        names = [name for name, own in NAMED_SIZES.items() if size.items() <= own.items()]
        arch = names[0] if names else f"a ViT of embed_dim {size['embed_dim']}, depth {depth}"
        return f"It looks like {arch}, patch_size {patches.shape[2]}, for images of {patches.shape[1]} channel(s)"
    for name in (name for name in TORCHVISION if "layer1.0.conv1.weight" in tensors and "resne" in name):
        with torch.device("meta"):
            shapes = build_backbone({"family": "torchvision", "name": name, "in_chans": 3}).state_dict()
        if all(key in tensors and tensors[key].shape == tensor.shape for key, tensor in shapes.items()):
            return f"It looks like {name}, for images of 3 channel(s)"
    return "Which network it is of was not recognised"


def untrained_backbone(facts: Mapping[str, Any]) -> nn.Module:
    """The network that a checkpoint's training began with, in eval mode: seeded, or of the initial weights' teacher.

    Raises:
        ValueError: The initial weights are not there any more, or others.
    """
    backbone = seeded_backbone(facts["arch"], facts["seed"]).eval()
    if facts.get("initial_weights_md5") is None:
        return backbone
    path = facts["params"]["initial_weights"]
    if digest(path) != facts["initial_weights_md5"]:
        raise ValueError(
            f"{path} has changed since the training that began with it: bring it back, or `dvc repro pretrain`"
        )
    backbone.load_state_dict(fitting_backbone(read_weights(path).teacher, backbone, path))
    return backbone
