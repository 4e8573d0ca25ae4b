"""Antialiased resampling of boxes as matrix products: each image has its own box, all in one batch.

A separable resampling is W_y image W_x^T. The filters are PIL's and torchvision's (cubic with a = -1/2, or linear;
widened when they shrink). A product is exact on every device, differs from torchvision by rounding only, and images
of different sizes stand in one padded batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CUBIC_A = -0.5
CUBIC_SUPPORT = 2.0


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC_A
    return torch.where(x < 1, near, torch.where(x < CUBIC_SUPPORT, far, 0.0))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


class Filter(NamedTuple):
    """A filter of resampling: torch's word for it, and its weight at a distance in pixels."""

    mode: str
    weight: Callable[[Tensor], Tensor]


BICUBIC = Filter("bicubic", _cubic)
BILINEAR = Filter("bilinear", _triangle)


def axis_weights(
    start_B: Tensor,
    length_B: Tensor,
    in_size: int,
    out_size_B: Tensor,
    first_B: Tensor,
    count: int,
    kernel: Filter = BICUBIC,
) -> Tensor:
    """Weights [B, count, in_size] that resample pixels start .. start + length of one axis to out_size pixels.

    Args:
        start_B, length_B: The box on this axis, whole pixels, as floats.
        in_size: Pixels of the (padded) axis.
        out_size_B: Pixels that the box becomes, as floats.
        first_B: First of the resampled pixels that is kept, as floats.
        count: How many are kept.
        kernel: BICUBIC or BILINEAR.
    """
    scale_B11 = (length_B / out_size_B)[:, None, None]
    widened_B11 = scale_B11.clamp(min=1.0)
    positions = torch.arange(count, device=start_B.device, dtype=start_B.dtype)
    centers_BO1 = scale_B11 * (positions + first_B[:, None] + 0.5)[..., None]
    pixels = torch.arange(in_size, device=start_B.device, dtype=start_B.dtype)
    offsets_B1I = pixels - start_B[:, None, None]
    weights = kernel.weight((offsets_B1I + 0.5 - centers_BO1) / widened_B11)
    inside = (offsets_B1I >= 0) & (offsets_B1I < length_B[:, None, None])
    weights = torch.where(inside, weights, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def resample(images_BCHW: Tensor, rows_BOH: Tensor, columns_BPW: Tensor) -> Tensor:
    """Apply the weights of both axes: [B, C, H, W] -> [B, C, O, P]."""
    return rows_BOH[:, None] @ images_BCHW @ columns_BPW.transpose(1, 2)[:, None]


def resample_box(pixels_CHW: Tensor, px: int, kernel: Filter) -> Tensor:
    """One whole box [C, H, W] to fp32 [1, C, px, px] by torch's own kernel of this filter."""
    return F.interpolate(pixels_CHW[None].float(), size=(px, px), mode=kernel.mode, antialias=True)
