"""Images -> rows of features in table order, on any number of ranks.

Legend: N images of the table, B of a batch, D features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dino.ahead import ahead
from dino.augment import eval_images
from dino.distributed import World
from dino.images import ImageBatch, ImageTable

Extractor = Callable[[ImageBatch], Tensor]  # images on a device -> [B, D] there


def backbone_features(
    backbone: nn.Module, *, resize_px: int, crop_px: int, mean: list[float], std: list[float]
) -> Extractor:
    """Float32 output of a network in eval mode (ViT: CLS) for evaluation images, as it comes, not normalised."""

    def extract(images: ImageBatch) -> Tensor:
        output_BD: Tensor = backbone(eval_images(images, resize_px=resize_px, crop_px=crop_px, mean=mean, std=std))
        return output_BD.float()

    return extract


def pixel_features(*, resize_px: int, crop_px: int) -> Extractor:
    """The evaluation image itself, uint8 (0..255 for 0..1), rows of pixels channel by channel."""

    def extract(images: ImageBatch) -> Tensor:
        channels = images.pixels_BCHW.shape[1]
        plain = {"mean": [0.0] * channels, "std": [1.0] * channels}
        pixels_BCHW = eval_images(images, resize_px=resize_px, crop_px=crop_px, **plain)
        return (pixels_BCHW * 255).round().clamp(0, 255).to(torch.uint8).flatten(1)

    return extract


def feature_batches(
    extractors: Sequence[Extractor], table: ImageTable, rows: Sequence[int], *, batch: int, world: World
) -> Iterator[list[Tensor]]:
    """Features [B, D] of these rows by each extractor, on the CPU, batch after batch in order, on every rank.

    Each batch is shared by the ranks. The next one is decoded while this one is computed.

    Args:
        extractors: they see the same decoded images.
        table: where the images are.
        rows: of the table.
        batch: images at once on each rank.
        world: the ranks that share the work; all must call this alike.
    """
    together = [rows[first : first + batch * world.size] for first in range(0, len(rows), batch * world.size)]
    shares = [world.rows(len(part)) for part in together]
    mine = [part[share.start : share.stop] for part, share in zip(together, shares, strict=True)]
    for images in decoded_ahead(table, mine):
        on_device = ImageBatch(images.pixels_BCHW.to(world.device), images.sizes_B2)
        with torch.inference_mode():
            found = [extract(on_device) for extract in extractors]
        yield [world.gather_rows(features_BD).cpu() for features_BD in found]


def features_of(
    extractors: Sequence[Extractor],
    table: ImageTable,
    rows: Sequence[int],
    *,
    batch: int,
    world: World,
    advance: Callable[[int], object] = lambda images: None,
) -> list[Tensor]:
    """All of `feature_batches`: features [len(rows), D] by each extractor; `advance` hears of each batch's images."""
    parts: list[list[Tensor]] = [[] for _ in extractors]
    for found in feature_batches(extractors, table, rows, batch=batch, world=world):
        for part, features_BD in zip(parts, found, strict=True):
            part.append(features_BD)
        advance(len(found[0]))
    return [torch.cat(part) if part else torch.empty(0) for part in parts]


def decoded_ahead(table: ImageTable, batches: Iterable[Sequence[int]]) -> Iterator[ImageBatch]:
    """Each batch decoded, the next ones while it is used; one of no rows too."""
    return ahead(partial(_decode, table), batches)


def _decode(table: ImageTable, rows: Sequence[int]) -> ImageBatch:
    if rows:
        return table.batch(rows)
    # more ranks than images are left: this one has none, but takes part
    one = table.batch([0])
    return ImageBatch(one.pixels_BCHW[:0], one.sizes_B2[:0])


def extract_features(
    backbone: nn.Module, table: ImageTable, *, resize_px: int, crop_px: int, batch: int, world: World
) -> Tensor:
    """Features float32 [N, D] of a whole table, in its order, on the CPU, the same on every rank.

    Args:
        backbone: moved to the world's device; put into eval mode by the caller.
        table: its mean and std normalise the images.
        resize_px: short side of the image before the centre crop.
        crop_px: side of the crop.
        batch: images at once on each rank.
        world: the ranks that share the work.

    Raises:
        ValueError: a crop larger than the resized image, or an image that does not decode.
    """
    extractor = backbone_features(
        backbone.to(world.device), resize_px=resize_px, crop_px=crop_px, mean=table.mean, std=table.std
    )
    return features_of([extractor], table, range(len(table)), batch=batch, world=world)[0]
