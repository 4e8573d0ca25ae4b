"""From settings to networks: the student's backbone and head, the teacher's, with seeded initial weights."""

from typing import Any

import torch

from dino.backbones import build_backbone, named_arch
from dino.config import PretrainConfig
from dino.head import DINOHead
from dino.model import DINO
from dino.vision_transformer import NAMED_SIZES


def backbone_arch(config: PretrainConfig, channels: int) -> dict[str, Any]:
    """The architecture as `dino.backbones` builds it; of a ViT, a setting of null is the named size's own.

    Raises:
        ValueError: A name that timm does not know, or a network that does not take the crops.
    """
    if config.arch not in NAMED_SIZES:
        try:
            return named_arch(config.arch, channels, config.crop_sizes_px)
        except ValueError as error:
            raise ValueError(f"pretrain.arch is {config.arch!r}: {error}") from error
    chosen = {name: getattr(config, name) or own for name, own in NAMED_SIZES[config.arch].items()}
    return {
        "family": "vit",
        "img_size": config.global_px,
        "patch_size": config.patch_size,
        "in_chans": channels,
        **chosen,
        "drop_path_rate": 0.0,
        "init_std": config.init_std,
        "position_std": config.position_std,
    }


def build_dino(config: PretrainConfig, channels: int) -> DINO:
    """Student and teacher with the initial weights of config.seed; the global generator stays as it was.

    The backbone is drawn first, so that its weights are those of `backbones.seeded_backbone` with the same seed.

    Raises:
        ValueError: A width that the heads do not divide, or an architecture that does not fit.
    """
    arch = backbone_arch(config, channels)
    of_student = {"drop_path_rate": config.drop_path_rate} if arch["family"] == "vit" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = build_backbone({**arch, **of_student})
        heads = [
            DINOHead(
                arch["embed_dim"],
                config.out_dim,
                use_bn=config.head_batch_norm,
                norm_last_layer=config.norm_last_layer,
                nlayers=config.head_layers,
                hidden_dim=config.hidden_dim,
                bottleneck_dim=config.bottleneck_dim,
            )
            for _ in range(2)
        ]
        return DINO(student, build_backbone(arch), *heads)
