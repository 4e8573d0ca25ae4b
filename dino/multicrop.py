"""Crops of several resolutions through one backbone and head (paper section 3.1, multi-crop)."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


class MultiCropWrapper(nn.Module):
    """Backbone and head: neighbouring crops of one resolution pass the backbone together, the head runs once."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self, crops: Tensor | Sequence[Tensor], drop_path_draws: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Prototype scores [V * B, K] in crop order.

        Args:
            crops: V tensors [B, C, H, W]; a single tensor is one crop.
            drop_path_draws: For each crop the draws of stochastic depth [depth, 2, B], or None.
        """
        crops = [crops] if isinstance(crops, Tensor) else list(crops)
        draws = drop_path_draws or [None] * len(crops)
        features = []
        for _, group in groupby(zip(crops, draws, strict=True), key=lambda pair: pair[0].shape[1:]):
            images, uniforms = zip(*group, strict=True)
            batch = images[0] if len(images) == 1 else torch.cat(images)
            if uniforms[0] is None:
                features.append(self.backbone(batch))
            else:
                features.append(self.backbone(batch, torch.cat(uniforms, dim=-1)))
        return self.head(torch.cat(features))
