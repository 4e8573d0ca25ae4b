"""An architecture as a plain dict -> the network: images [N, C, H, W] to pooled features [N, D].

`family` says whose network it is, the other entries are its arguments; `in_chans` (C) and `embed_dim` (D) stand in all:

    {"family": "vit", "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 384, ...}  VisionTransformer's own
    {"family": "torchvision", "name": "resnet50", "in_chans": 3, "embed_dim": 2048}
    {"family": "timm", "name": "vit_small_patch16_224", "in_chans": 3, "embed_dim": 384}
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dino.vision_transformer import VisionTransformer

TIMM = "timm/"  # beginning of the names of timm's networks
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def build_backbone(arch: Mapping[str, Any]) -> nn.Module:
    """The network of an architecture, with initial weights of torch's global generator.

    Raises:
        ValueError: An unknown family or name, timm that is not installed, or a ViT's sizes that do not fit.
    """
    match arch:
        case {"family": "vit", **settings}:
            return VisionTransformer(**settings)
        case {"family": "torchvision", "name": name, "in_chans": in_chans}:
            return _torchvision_backbone(name, in_chans)
        case {"family": "timm", "name": name, "in_chans": in_chans}:
            return _timm_backbone(name, in_chans)
    raise ValueError(f"{arch} is no architecture: its family is vit, torchvision or timm")


def seeded_backbone(arch: Mapping[str, Any], seed: int) -> nn.Module:
    """A network with the initial weights of this seed; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch)


def named_arch(name: str, in_chans: int, sizes_px: Sequence[int]) -> dict[str, Any]:
    """The architecture of a torchvision name, or of timm's `timm/NAME`, tried out with images of these sizes.

    Raises:
        ValueError: An unknown name, timm that is not installed, or images that the network does not take.
    """
    family = "timm" if name.startswith(TIMM) else "torchvision"
    arch = {"family": family, "name": name.removeprefix(TIMM), "in_chans": in_chans}
    network = seeded_backbone(arch, seed=0).eval()
    widths = [feature_width(network, in_chans, px) for px in sizes_px]
    return {**arch, "embed_dim": widths[0]}


@torch.no_grad()
def feature_width(backbone: nn.Module, in_chans: int, size_px: int) -> int:
    """Width D of the features of a network in eval mode, found with a black square image of this side.

    Raises:
        ValueError: The network does not take such images, or gives something else than one row of features each.
    """
    image = torch.zeros(1, in_chans, size_px, size_px, device=next(backbone.parameters()).device)
    try:
        features = backbone(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"the network does not take images of {size_px} x {size_px} pixels ({error})") from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ValueError(f"the network gives no pooled features for images of {size_px} x {size_px} pixels")
    return features.shape[1]


def _torchvision_backbone(name: str, in_chans: int) -> nn.Module:
    """A classifier of torchvision without its last Linear; another number of channels gets a fresh first convolution.

    Its random layers are off: their draws would depend on the number of ranks and on where a run was resumed.
    """
    import torchvision  # here: it takes more than a second, and our ViTs need none of it

    network: nn.Module = torchvision.models.get_model(name, weights=None)
    modules = list(network.named_modules())
    last_linear = [path for path, module in modules if isinstance(module, nn.Linear)][-1]
    _replace(network, last_linear, nn.Identity())
    if in_chans != 3:
        path, old = next((path, module) for path, module in modules if isinstance(module, nn.Conv2d))
        sizes: Any = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
        _replace(network, path, nn.Conv2d(in_chans, old.out_channels, **sizes, bias=old.bias is not None))
    return _without_random_layers(network)


def _timm_backbone(name: str, in_chans: int) -> nn.Module:
    """A network of timm without its classifier, its random layers off; where it can, it takes images of any size."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError("timm is not installed: pip install timm") from error
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {TIMM}{close[0]}?" if close else "timm.list_models() lists those it knows"
        raise ValueError(f"timm {timm.__version__} has no such network; {hint}")
    settings: Any = {"pretrained": False, "num_classes": 0, "in_chans": in_chans}
    try:
        network = timm.create_model(name, dynamic_img_size=True, **settings)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        network = timm.create_model(name, **settings)
    return _without_random_layers(network)


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def _without_random_layers(network: nn.Module) -> nn.Module:
    from torchvision.ops import StochasticDepth  # here: as above

    for module in network.modules():
        if isinstance(module, (*DROPOUTS, StochasticDepth)):
            module.p = 0.0
        if hasattr(module, "drop_prob"):  # timm's stochastic depth
            module.drop_prob = 0.0  # type: ignore[assignment]
    return network
