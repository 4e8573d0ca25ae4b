"""Whether the evaluation images, of the sizes in section embed, are such as the network takes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dino.backbones import feature_width
from pipelines import paths
from pipelines.params import Embed


def check_view(sizes: Embed, backbone: nn.Module, facts: Mapping[str, Any], *, channels: int) -> None:
    """Refuse sizes that do not fit the network of these facts, or images of these channels.

    Raises:
        ValueError: with place and cure.
    """
    patch, crop = facts["arch"].get("patch_size", 1), sizes.crop_px
    now = {"resize_px": sizes.resize_px, "crop_px": crop}
    if facts.get("evaluation", now) != now:  # a stage run by hand: DVC selects anew where they change
        raise ValueError(
            f"{paths.TEACHER} was selected on images of {facts['evaluation']}, embed now asks for {now}; "
            "`dvc repro embed` selects anew"
        )
    if crop > sizes.resize_px:
        raise ValueError(
            f"embed.crop_px ({crop}) is larger than embed.resize_px ({sizes.resize_px}); choose at most that"
        )
    if crop % patch:
        below, above = crop // patch * patch, (crop // patch + 1) * patch
        fitting = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"embed.crop_px ({crop}) is not divisible by the patch size ({patch} px) of {paths.TEACHER}; "
            f"choose {fitting}"
        )
    if channels != facts["channels"]:
        raise ValueError(
            f"{paths.TEACHER} was trained on images of {facts['channels']} channel(s), those of {paths.TRAIN_IMAGES} "
            f"have {channels}; `dvc repro pretrain` trains on these"
        )
    try:
        feature_width(backbone, channels, crop)
    except ValueError as error:
        raise ValueError(f"embed.crop_px ({crop}): {error}; choose a size of crops that it was trained on") from error
