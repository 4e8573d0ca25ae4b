"""Batched multi-crop on the device that trains, each sample with its own draws (paper section 3.1, appendix C).

What is drawn is a pure function of (seed, step, row of the global batch, view), made on the CPU in float64: the same
for every device and number of ranks. Applying it is batched tensor arithmetic in fp32 on pixels of 0..1.

Legend: B images, N = views of one size times B, C channels, P pixels of a crop's side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dino import draws
from dino.config import GLOBAL_CROPS, PretrainConfig
from dino.images import ImageBatch
from dino.resample import BICUBIC, Filter, axis_weights, resample, resample_box

BOX_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to the centre
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's and PIL's (ITU-R 601)
BLUR_REACH = 4  # standard deviations beyond which the kernel (3e-4 of its peak) is cut
SOLARIZE_THRESHOLD = 128 / 255
TINY = 1e-9  # below any difference of two pixels, so that grey (chroma 0) divides
CACHED_VALUES = 1 << 18  # of fp32, about a core's own cache: on a CPU so many are distorted at once
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class BoxDraws:
    """Where a crop is cut, a row each; CPU tensors."""

    top: Tensor  # box in pixels, int64 [N]
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool [N]


@dataclass(frozen=True)
class CropDraws(BoxDraws):
    """Everything random of a crop of pretraining."""

    jitter: Tensor  # bool [N]
    order: Tensor  # int64 [N, 4]: which of JITTER_OPERATIONS comes first, second, ...
    factors: Tensor  # float64 [N, 4]: in the order of JITTER_OPERATIONS; hue as a shift of the circle
    grayscale: Tensor  # bool [N]
    blur: Tensor  # bool [N]
    radius: Tensor  # float64 [N]: standard deviation in pixels
    solarize: Tensor  # bool [N]

    def rows(self, part: slice) -> "CropDraws":
        """The draws of some crops."""
        return CropDraws(**{f.name: getattr(self, f.name)[part] for f in fields(CropDraws)})

    @staticmethod
    def cat(parts: "list[CropDraws]") -> "CropDraws":
        """The draws of several views as one."""
        return CropDraws(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(CropDraws)})


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + u * (high - low)


def draw_boxes(u_N22: Tensor, sizes_N2: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """RandomResizedCrop's boxes, int64 [N, 4] of top, left, height, width: the first of ten attempts that fits.

    Args:
        u_N22: Draws of [0, 1): ten areas, ten ratios, top, left.
        sizes_N2: Height and width of each image.
        scale: Range of the area as share of the image's.
        ratio: Range of width over height, drawn log-uniformly.
    """
    size = sizes_N2.double()
    area = _between(u_N22[:, :BOX_ATTEMPTS], *scale) * size.prod(dim=1, keepdim=True)
    aspect = torch.exp(_between(u_N22[:, BOX_ATTEMPTS : 2 * BOX_ATTEMPTS], math.log(ratio[0]), math.log(ratio[1])))
    width, height = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (width > 0) & (height > 0) & (height <= size[:, :1]) & (width <= size[:, 1:])
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    H, W = size[:, 0], size[:, 1]
    fallback_width = torch.where(ratio[1] < W / H, (H * ratio[1]).round(), W)
    fallback_height = torch.where(ratio[0] > W / H, (W / ratio[0]).round(), H)
    width = torch.where(found, width.gather(1, first)[:, 0], fallback_width)
    height = torch.where(found, height.gather(1, first)[:, 0], fallback_height)
    top = torch.where(found, (u_N22[:, -2] * (H - height + 1)).floor(), ((H - height) / 2).floor())
    left = torch.where(found, (u_N22[:, -1] * (W - width + 1)).floor(), ((W - width) / 2).floor())
    return torch.stack([top, left, height, width], dim=1).long()


def draw_view(config: PretrainConfig, view: int, step: int, rows: Tensor, sizes_B2: Tensor) -> CropDraws:
    """What is drawn for one view of each image; rows are those of the global batch."""
    boxes = 2 * BOX_ATTEMPTS + 2
    u = draws.uniform(config.seed, draws.CROPS + view, step, rows, boxes + 14)
    is_global = view < GLOBAL_CROPS
    kind = min(view, GLOBAL_CROPS)
    scale = config.global_scale if is_global else config.local_scale
    top, left, height, width = draw_boxes(u[:, :boxes], sizes_B2, scale, config.ratio).unbind(1)
    flip, jitter, gray, blur, radius, solarize = u[:, boxes : boxes + 6].unbind(1)
    ranges = [(max(0.0, 1 - x), 1 + x) for x in (config.brightness, config.contrast, config.saturation)]
    ranges.append((-config.hue, config.hue))
    factors = [_between(u[:, boxes + 10 + i], *bounds) for i, bounds in enumerate(ranges)]
    return CropDraws(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=flip < config.flip,
        jitter=jitter < config.jitter_p,
        order=u[:, boxes + 6 : boxes + 10].argsort(dim=1, stable=True),
        factors=torch.stack(factors, dim=1),
        grayscale=gray < config.grayscale_p,
        blur=blur < config.blur_p[kind],
        radius=_between(radius, *config.blur_radius),
        solarize=solarize < config.solarize_p[kind],
    )


def crop_boxes(pixels_BCHW: Tensor, draws_N: BoxDraws, crop_px: int, kernel: Filter = BICUBIC) -> Tensor:
    """Cut, resize by this filter, flip: uint8 [B, C, H, W] -> fp32 [N, C, P, P] of 0..1; N a multiple of B."""
    cut = cut_each if pixels_BCHW.device.type == "cpu" else cut_by_products
    return cut(pixels_BCHW, draws_N, crop_px, kernel)


def cut_each(pixels_BCHW: Tensor, draws_N: BoxDraws, crop_px: int, kernel: Filter = BICUBIC) -> Tensor:
    """`crop_boxes` box after box: on a CPU, where a product would mostly multiply pixels outside the box by zero."""
    boxes = zip(*(x.tolist() for x in (draws_N.top, draws_N.left, draws_N.height, draws_N.width)), strict=True)
    none = torch.empty(0, pixels_BCHW.shape[1], crop_px, crop_px)  # a rank may be left without images
    cut = [
        resample_box(pixels_BCHW[n % len(pixels_BCHW), :, top : top + height, left : left + width], crop_px, kernel)
        for n, (top, left, height, width) in enumerate(boxes)
    ]
    images = torch.cat([none, *cut])
    flipped = torch.nonzero(draws_N.flip)[:, 0]
    images[flipped] = images[flipped].flip(-1)
    return images.div_(255).clamp_(0, 1)


def cut_by_products(pixels_BCHW: Tensor, draws_N: BoxDraws, crop_px: int, kernel: Filter = BICUBIC) -> Tensor:
    """`crop_boxes` of all boxes at once: on a GPU, where launching costs more than multiplying."""
    device = pixels_BCHW.device
    N = len(draws_N.top)
    images = pixels_BCHW.float() / 255
    if len(images) < N:
        images = images.repeat(N // len(images), 1, 1, 1)
    boxes = torch.stack([draws_N.top, draws_N.left, draws_N.height, draws_N.width]).float().to(device)
    out = torch.full((N,), float(crop_px), device=device)
    first = torch.zeros(N, device=device)
    rows = axis_weights(boxes[0], boxes[2], images.shape[2], out, first, crop_px, kernel)
    columns = axis_weights(boxes[1], boxes[3], images.shape[3], out, first, crop_px, kernel)
    flip = draws_N.flip.to(device)[:, None, None]
    columns = torch.where(flip, columns.flip(1), columns)
    return resample(images, rows, columns).clamp_(0, 1)


def gray_of(images_NCPP: Tensor) -> Tensor:
    """Luminance [N, 1, P, P]; a grey image is its own."""
    if images_NCPP.shape[1] == 1:
        return images_NCPP
    weights = torch.tensor(GRAY_WEIGHTS, device=images_NCPP.device)
    return (images_NCPP * weights[:, None, None]).sum(dim=1, keepdim=True)


def adjust_brightness(images: Tensor, factor_N111: Tensor) -> Tensor:
    """Scale towards black."""
    return (images * factor_N111).clamp(0, 1)


def adjust_contrast(images: Tensor, factor_N111: Tensor) -> Tensor:
    """Blend with the image's mean luminance."""
    mean = gray_of(images).mean(dim=(1, 2, 3), keepdim=True)
    return (images * factor_N111 + mean * (1 - factor_N111)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor_N111: Tensor) -> Tensor:
    """Blend with the luminance."""
    return (images * factor_N111 + gray_of(images) * (1 - factor_N111)).clamp(0, 1)


def adjust_hue(images: Tensor, shift_N111: Tensor) -> Tensor:
    """Turn the hue by this share of the circle."""
    r, g, b = images.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    red, green = high == r, high == g
    hue = torch.where(red, g - b, torch.where(green, b - r, r - g)).div_(chroma.clamp(min=TINY))  # grey: 0
    hue += torch.where(red, 0.0, torch.where(green, 2.0, 4.0)) + 6.0 * shift_N111[:, :, 0]
    # A channel of a colour with this hue is high - chroma * ramp, the ramp shifted by 1/3 between channels.
    offset = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    k = hue[:, None] + offset
    k -= (k / 6.0).floor_().mul_(6.0)  # a remainder, and faster than torch's
    ramp = torch.minimum(k, 4.0 - k).clamp_(0, 1)
    return ramp.mul_(chroma[:, None]).neg_().add_(high[:, None])


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def change(images: Tensor, chosen_N: Tensor, operation: Callable[..., Tensor], *arguments_N: Tensor) -> None:
    """images[chosen] = operation(images[chosen], argument[chosen] ...), in place; chosen_N is bool, on the CPU."""
    chosen = torch.nonzero(chosen_N)[:, 0]
    if not len(chosen):
        return
    there = chosen.to(images.device)
    arguments = [argument_N[there.to(argument_N.device)] for argument_N in arguments_N]
    changed = operation(images.index_select(0, there), *arguments)
    if images.device.type == "cpu":  # torch copies image by image four times as fast as by index
        for number, image in zip(chosen.tolist(), changed, strict=True):
            images[number] = image
    else:
        images.index_copy_(0, there, changed)


def color_jitter(images: Tensor, draws_N: CropDraws) -> Tensor:
    """Brightness, contrast, saturation and hue in each sample's own order; the first two only on grey images."""
    operations = 2 if images.shape[1] == 1 else len(ADJUSTMENTS)
    factors = draws_N.factors.float().to(images.device)[..., None, None, None]
    images = images.clone()
    for position in range(len(ADJUSTMENTS)):
        turn = torch.where(draws_N.jitter, draws_N.order[:, position], -1)
        for operation in range(operations):
            change(images, turn == operation, ADJUSTMENTS[operation], factors[:, operation])
    return images


def blur_weights(radius_N: Tensor, px: int) -> Tensor:
    """Matrix [N, P, P] of a Gaussian of this standard deviation along one axis, edge pixels repeated outwards.

    Bit for bit a function of the row's own radius: each kernel is cut at its own reach, and sums begin at the far end,
    where the zeros that a longer kernel of another row brings change nothing.
    """
    farthest = max(math.ceil(BLUR_REACH * float(radius_N.max())), px)
    distance = torch.arange(farthest, -1, -1, dtype=radius_N.dtype)
    kernel = torch.exp(-0.5 * (distance / radius_N[:, None]) ** 2)
    kernel = torch.where(distance <= (BLUR_REACH * radius_N[:, None]).ceil(), kernel, 0.0)
    at_least = kernel.cumsum(dim=1)  # one side's weight at this distance and beyond
    total = 2 * at_least[:, -1:] - kernel[:, -1:]
    kernel, at_least = kernel / total, at_least / total
    place = torch.arange(px)
    weights = kernel[:, farthest - (place - place[:, None]).abs()]
    weights[..., 0] += at_least[:, farthest - place - 1]
    weights[..., -1] += at_least[:, farthest - place.flip(0) - 1]
    return weights


def gaussian_blur(images: Tensor, radius_N: Tensor) -> Tensor:
    """Blur each image [N, C, P, P] with its own standard deviation in pixels."""
    weights = blur_weights(radius_N, images.shape[-1]).float().to(images.device)[:, None]
    if images.device.type == "cpu":  # image by image: a batched product there is rounded by how many there are
        return torch.stack([w @ image @ w.mT for w, image in zip(weights, images, strict=True)])
    return weights @ images @ weights.mT


def solarize(images: Tensor) -> Tensor:
    """Invert what is at least as bright as the threshold."""
    return torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images)


def apply_draws(pixels_BCHW: Tensor, draws_N: CropDraws, crop_px: int) -> Tensor:
    """The paper's chain with given draws, before normalisation: uint8 [B, C, H, W] -> fp32 [N, C, P, P] of 0..1."""
    images = crop_boxes(pixels_BCHW, draws_N, crop_px)
    N = len(images)
    at_once = max(1, CACHED_VALUES // images[0].numel()) if images.device.type == "cpu" else N
    parts = [slice(first, first + at_once) for first in range(0, N, at_once)]
    return torch.cat([distort(images[part], draws_N.rows(part)) for part in parts])


def distort(images: Tensor, draws_N: CropDraws) -> Tensor:
    """Everything after cutting: colours, blur, solarization."""
    images = color_jitter(images, draws_N)
    if images.shape[1] > 1:
        change(images, draws_N.grayscale, lambda colour: gray_of(colour).expand_as(colour))
    change(images, draws_N.blur, gaussian_blur, draws_N.radius)
    change(images, draws_N.solarize, solarize)
    return images


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(images - mean) / std per channel."""
    device = images.device
    return (images - torch.tensor(mean, device=device)[:, None, None]) / torch.tensor(std, device=device)[:, None, None]


def multi_crop(
    batch: ImageBatch, *, config: PretrainConfig, step: int, rows: Tensor, mean: list[float], std: list[float]
) -> list[Tensor]:
    """All crops of a batch: two global [B, C, global_px, global_px], then the local ones.

    Args:
        batch: Decoded images; the pixels lie on the device that trains.
        config: Sizes, scales and probabilities.
        step: Optimizer step.
        rows: Rows of the global batch, int64 [B].
        mean, std: Per channel, of pixels in 0..1.
    """
    crops: list[Tensor] = []
    for views, px in (
        (range(GLOBAL_CROPS), config.global_px),
        (range(GLOBAL_CROPS, config.views), config.local_px),
    ):
        if len(views):
            drawn = CropDraws.cat([draw_view(config, view, step, rows, batch.sizes_B2) for view in views])
            images = normalize(apply_draws(batch.pixels_BCHW, drawn, px), mean, std)
            crops.extend(images.chunk(len(views)))
    return crops


def eval_images(batch: ImageBatch, *, resize_px: int, crop_px: int, mean: list[float], std: list[float]) -> Tensor:
    """Short side resized to resize_px (bicubic), centre crop, normalised: fp32 [B, C, crop_px, crop_px].

    Raises:
        ValueError: A crop larger than the resized image.
    """
    if crop_px > resize_px:
        raise ValueError(f"crop_px ({crop_px}) is larger than resize_px ({resize_px}): choose at most {resize_px}")
    device = batch.pixels_BCHW.device
    sizes = batch.sizes_B2.double()
    resized = (sizes * resize_px / sizes.amin(dim=1, keepdim=True)).floor()  # torchvision truncates the long side
    first = ((resized - crop_px) / 2).round()
    sizes, resized, first = (x.float().to(device) for x in (sizes, resized, first))
    zeros = torch.zeros(len(sizes), device=device)
    H, W = batch.pixels_BCHW.shape[-2:]
    rows = axis_weights(zeros, sizes[:, 0], H, resized[:, 0], first[:, 0], crop_px)
    columns = axis_weights(zeros, sizes[:, 1], W, resized[:, 1], first[:, 1], crop_px)
    return normalize(resample(batch.pixels_BCHW.float() / 255, rows, columns).clamp_(0, 1), mean, std)
