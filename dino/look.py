"""What a backbone sees, as pictures: attention of its last block, PCA of patch features.

Made for a few images at a time; pictures are uint8 RGB arrays [H, W, 3]. Equal inputs give equal pictures:
ties, and signs that linear algebra leaves open, are settled here.

Legend: B images, C channels, H height and W width in pixels, A heads, T tokens (CLS first), R x S patches,
M = B R S, D width of the features.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.augment import GRAY_WEIGHTS
from dino.resample import axis_weights, resample
from dino.vision_transformer import VisionTransformer

# black over purple and orange to pale yellow, in evenly rising lightness: readable with any colour vision
HEAT = (
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
    (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
)  # fmt: skip
PCA_QUANTILES = (0.01, 0.99)  # of a component, shown as 0 and 1: outliers don't grey the rest
DIMMED, OPAQUE = 0.75, 0.85  # of an overlay: brightness of the picture beneath, cover of the strongest patch
NEGLIGIBLE = 1e-5  # a component this small beside the first is rounding of fp32 features, not a direction


@torch.no_grad()
def attention_maps(backbone: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Attention of the CLS token on each patch in the last block (paper, figure 1), float32 [B, A, R, S].

    Softmax weights: a head's sum over the patches is 1 minus the CLS token's attention on itself.
    """
    rows, columns = _grid(backbone, images_BCHW)
    weights_BATT = backbone.get_last_selfattention(images_BCHW)
    return weights_BATT[:, :, 0, 1:].float().unflatten(-1, (rows, columns))


@torch.no_grad()
def patch_features(backbone: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Features of the last block's patches, float32 [B, R, S, D]."""
    tokens_BTD = backbone.get_intermediate_layers(images_BCHW, 1)[0]
    return tokens_BTD[:, 1:].float().unflatten(1, _grid(backbone, images_BCHW))


def patch_components(backbone: VisionTransformer, images_BCHW: Tensor, *, components: int = 3) -> Tensor:
    """First principal components of the last block's patch features, float32 [B, R, S, components] in 0..1.

    One basis for all these images, so that equal colours mean similar patches across pictures.
    """
    features_BRSD = patch_features(backbone, images_BCHW)
    return principal_components(features_BRSD.flatten(0, 2), components=components).unflatten(
        0, features_BRSD.shape[:3]
    )


def principal_components(features_MD: Tensor, *, components: int = 3) -> Tensor:
    """First principal components of rows of features, float32 [M, components] in 0..1.

    Each component is scaled by PCA_QUANTILES; one that does not vary, or does not exist, is .5 everywhere. Of the two
    signs of a component, the one whose largest loading is positive.
    """
    features_MD = features_MD.double()
    features_MD = features_MD - features_MD.mean(0)
    _, sizes, basis = torch.linalg.svd(features_MD, full_matrices=False)
    scores = torch.full((len(features_MD), components), 0.5, dtype=torch.float64)
    for index in range(min(components, len(basis))):
        if sizes[index] > NEGLIGIBLE * sizes[0]:
            loadings_D = basis[index] * torch.sign(basis[index][basis[index].abs().argmax()])
            scores[:, index] = _stretched(features_MD @ loadings_D)
    return scores.float()


def _stretched(values: Tensor) -> Tensor:
    low, high = torch.quantile(values, torch.tensor(PCA_QUANTILES, dtype=values.dtype)).tolist()
    return ((values - low) / (high - low)).clamp(0, 1) if high > low else torch.full_like(values, 0.5)


def _grid(backbone: VisionTransformer, images_BCHW: Tensor) -> tuple[int, int]:
    """Patches of a column and of a row of these images."""
    assert not backbone.training, "pictures are of a backbone in eval mode"
    height, width = images_BCHW.shape[-2:]
    return height // backbone.patch_size, width // backbone.patch_size


def whole_image(pixels_CHW: Tensor, *, short_px: int, multiple: int) -> Tensor:
    """All of an image, uint8 [C, H, W], at a chosen resolution: float32 [C, h, w] of 0..1.

    Its short side becomes short_px (bicubic, antialiased), rounded to a multiple of the patch; of the long side, what
    is over a multiple is cut off, as much at both ends.
    """
    height, width = pixels_CHW.shape[1:]
    short = max(round(short_px / multiple), 1) * multiple
    weights = []
    for length in (height, width):
        resized = length * short / min(height, width)
        kept = int(resized + 1e-6) // multiple * multiple  # exact for the short side
        box = (torch.tensor([0.0]), torch.tensor([float(length)]), length)
        weights.append(axis_weights(*box, torch.tensor([resized]), torch.tensor([(resized - kept) / 2]), kept))
    return resample(pixels_CHW[None].float() / 255, *weights)[0].clamp(0, 1)


def enlarged(values_RSX: Tensor, height: int, width: int) -> Tensor:
    """Values of patches at every pixel of a picture, float32 [height, width, X]: bicubic, within their own range."""
    smooth = F.interpolate(values_RSX.permute(2, 0, 1)[None], size=(height, width), mode="bicubic")
    return smooth[0].permute(1, 2, 0).clamp(values_RSX.min(), values_RSX.max())


def overlaid(picture: np.ndarray, values_RS: Tensor) -> np.ndarray:
    """A picture in dimmed grey with a map of its patches in colours of HEAT over it, the stronger the more opaque."""
    height, width = picture.shape[:2]
    values_HW = enlarged(values_RS[..., None].float(), height, width)[..., 0]
    share_HW1 = ((values_HW - values_HW.min()) / (values_HW.max() - values_HW.min()).clamp(min=1e-12))[
        ..., None
    ].numpy()
    grey_HW1 = (picture @ np.array(GRAY_WEIGHTS))[..., None] * DIMMED
    opaque_HW1 = OPAQUE * share_HW1**0.5
    return np.rint(grey_HW1 * (1 - opaque_HW1) + heat_picture(values_HW) * opaque_HW1).astype(np.uint8)


def heat_picture(values_RS: Tensor) -> np.ndarray:
    """Values as colours of HEAT, the least black and the largest the palest, uint8 [R, S, 3]."""
    values = values_RS.double().numpy()
    share = (values - values.min()) / max(np.ptp(values), np.finfo(np.float64).tiny)
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(share, stops, channel) for channel in zip(*HEAT, strict=True)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def colour_picture(values_RS3: Tensor) -> np.ndarray:
    """Values of 0..1 as colours, uint8 [R, S, 3]."""
    return np.rint(values_RS3.double().numpy() * 255).astype(np.uint8)


def image_picture(image_CHW: Tensor) -> np.ndarray:
    """A stored image, uint8 [C, H, W] (grey or RGB), as a picture [H, W, 3]."""
    return np.ascontiguousarray(image_CHW.expand(3, -1, -1).permute(1, 2, 0).numpy())


def seen_picture(image_CHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image, float [C, H, W], back as the picture [H, W, 3] that the backbone was given."""
    mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return image_picture(((image_CHW * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8))


def fitted(picture: np.ndarray, side_px: int) -> np.ndarray:
    """A picture magnified by a whole number, or else shrunk, so that its long side is at most `side_px`.

    Magnified pixels stay sharp squares; shrunk ones are means over area.
    """
    height, width = picture.shape[:2]
    if times := side_px // max(height, width):
        return np.repeat(np.repeat(picture, times, axis=0), times, axis=1)
    size = tuple(max(1, round(length * side_px / max(height, width))) for length in (height, width))
    pixels_1CHW = torch.tensor(picture, dtype=torch.float64).permute(2, 0, 1)[None]
    shrunk = F.interpolate(pixels_1CHW, size=size, mode="area")
    return np.ascontiguousarray(shrunk[0].permute(1, 2, 0).round().to(torch.uint8).numpy())
