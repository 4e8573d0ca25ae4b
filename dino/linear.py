"""The paper's linear evaluation (section 4.1): linear classifiers on a frozen backbone, trained on augmented images.

As the reference does it: features are not normalised, crops and flips are torchvision's defaults (bilinear), SGD has
momentum and no weight decay, weights begin at N(0, .01), the learning rate falls along a cosine. Ours falls with
each step, the reference's with each epoch: of 100 epochs that is the same to 1.6 % of the peak, of three it is not.
All learning rates, and all backbones, see the same crops of one pass over the images.

Legend: N training images, B of a batch, D features, S learning rates, C classes, W = S * C.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino import draws
from dino.augment import BOX_ATTEMPTS, BoxDraws, crop_boxes, draw_boxes, eval_images, normalize
from dino.distributed import World
from dino.features import Extractor, decoded_ahead
from dino.images import ImageBatch, ImageTable
from dino.regression import Classifiers, Regressions
from dino.resample import BILINEAR
from dino.schedules import cosine
from dino.vision_transformer import VisionTransformer

INITIAL_STD = 0.01  # of the weights

Features = Callable[[Tensor], Tensor]  # normalised images [B, ...] -> [B, D]


@dataclass(frozen=True)
class Crops:
    """Augmentation of the training images; torchvision's defaults, but for the size.

    px: side of the crop.
    scale: of its area, as share of the image's.
    ratio: width over height.
    flip: probability.
    """

    px: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


def linear_features(backbone: nn.Module, *, blocks: int, patch_average: bool) -> Features:
    """What the classifiers see of a frozen backbone in eval mode.

    Args:
        backbone: ours, or any network of pooled features, which are taken as they are: no blocks, no patch tokens.
        blocks: CLS of this many last blocks side by side, the final norm applied to each (paper: ViT-S 4, ViT-B 1).
        patch_average: the mean patch token of the last block too (paper: ViT-B).

    Raises:
        ValueError: more blocks than the network has.
    """
    if not isinstance(backbone, VisionTransformer):
        return backbone
    if not 1 <= blocks <= len(backbone.blocks):
        raise ValueError(f"linear.blocks is {blocks}, the network has {len(backbone.blocks)}; choose from 1 to that")

    def features(images_BCHW: Tensor) -> Tensor:
        layers = backbone.get_intermediate_layers(images_BCHW, blocks)
        parts = [tokens_BTD[:, 0] for tokens_BTD in layers]
        if patch_average:
            parts.append(layers[-1][:, 1:].mean(1))
        return torch.cat(parts, dim=1)

    return features


def evaluation_features(
    features: Features, *, resize_px: int, crop_px: int, mean: list[float], std: list[float]
) -> Extractor:
    """The same of evaluation images, for `dino.features.feature_batches`."""

    def extract(images: ImageBatch) -> Tensor:
        return features(eval_images(images, resize_px=resize_px, crop_px=crop_px, mean=mean, std=std))

    return extract


def random_crops(images: ImageBatch, crops: Crops, *, seed: int, epoch: int, rows: Tensor) -> Tensor:
    """One crop of each image, flipped or not, fp32 [B, C, px, px] of 0..1; drawn by (seed, epoch, row of the table)."""
    boxes = 2 * BOX_ATTEMPTS + 2
    uniform = draws.uniform(seed, draws.LINEAR, epoch, rows, boxes + 1)
    top, left, height, width = draw_boxes(uniform[:, :boxes], images.sizes_B2, crops.scale, crops.ratio).unbind(1)
    drawn = BoxDraws(top=top, left=left, height=height, width=width, flip=uniform[:, boxes] < crops.flip)
    return crop_boxes(images.pixels_BCHW, drawn, crops.px, BILINEAR)


def train_linear(
    backbones: Sequence[Features],
    table: ImageTable,
    rows_N: Tensor,
    labels_N: Tensor,
    *,
    crops: Crops,
    lrs_at_256: Sequence[float],
    epochs: int,
    batch: int,
    momentum: float,
    seed: int,
    world: World,
    mean: list[float],
    std: list[float],
    advance: Callable[[int], object] = lambda images: None,
) -> Iterator[list[Classifiers]]:
    """After each epoch, S classifiers of each backbone, in the order of the learning rates; all trained at once.

    Ranks share the images of each batch and exchange features: each image counts once, and every rank holds the
    same classifiers, which do not depend on the number of ranks.

    Args:
        backbones: features of normalised images, frozen, on the world's device.
        table: where the images are.
        rows_N: of the labelled images there.
        labels_N: int64, any values; where they lie, the classifiers are trained.
        crops: the augmentation.
        lrs_at_256: peak learning rate for a batch of 256 each; scaled by the batch.
        epochs: passes over the images.
        batch: images per step, over all ranks; the last one of an epoch may be smaller.
        momentum: of SGD.
        seed: of initial weights, order and crops.
        world: the ranks that share the work; all must call this alike.
        mean, std: of the backbone's images, per channel.
        advance: called with how many more images are done.

    Raises:
        ValueError: no images, or an image that does not decode.
    """
    if not len(rows_N):
        raise ValueError("no labelled images to train a linear classifier on; give the training images labels")
    classes_C, column_N = labels_N.unique(return_inverse=True)
    count, lr_S = len(rows_N), [lr * batch / 256 for lr in lrs_at_256]
    steps, step = epochs * math.ceil(count / batch), 0
    trained: list[Regressions] = []
    for epoch in range(epochs):
        batches = draws.epoch_order(seed, epoch, count).split(batch)
        shares = [world.rows(len(order_B)) for order_B in batches]
        mine = [rows_N[order_B[share.start : share.stop]] for order_B, share in zip(batches, shares, strict=True)]
        ahead = decoded_ahead(table, [rows.tolist() for rows in mine])
        for order_B, rows, images in zip(batches, mine, ahead, strict=True):
            on_device = ImageBatch(images.pixels_BCHW.to(world.device), images.sizes_B2)
            with torch.inference_mode():
                crop_BCPP = normalize(random_crops(on_device, crops, seed=seed, epoch=epoch, rows=rows), mean, std)
                found = [world.gather_rows(features(crop_BCPP)).to(labels_N.device) for features in backbones]
            trained = trained or [
                _beginning(features_BD, lr_S, len(classes_C), momentum, seed) for features_BD in found
            ]
            column_B = column_N[order_B.to(column_N.device)]
            share = cosine(step, base=1.0, final=0.0, total_steps=steps)
            for regressions, features_BD in zip(trained, found, strict=True):
                regressions.step(features_BD, column_B, share)
            step += 1
            advance(len(order_B))
        yield [_classifiers(regressions, classes_C) for regressions in trained]


def _beginning(features_BD: Tensor, lr_S: Sequence[float], classes: int, momentum: float, seed: int) -> Regressions:
    """Each learning rate begins with the same weights, as in runs of its own with one seed."""
    draw = torch.Generator().manual_seed(seed)
    weights_DC = torch.randn(features_BD.shape[1], classes, generator=draw) * INITIAL_STD
    rates_W = features_BD.new_tensor(lr_S).repeat_interleave(classes)
    return Regressions(
        weights_DC.to(features_BD).repeat(1, len(lr_S)),
        len(lr_S),
        rates=rates_W,
        bias_rates_W=rates_W,
        momentum=momentum,
    )


def _classifiers(trained: Regressions, classes_C: Tensor) -> Classifiers:
    """As they are now; a later step does not change them."""
    shape = (trained.settings, len(classes_C))
    weights_DW = trained.weights_DW.clone()
    return Classifiers(
        weights_DW.new_zeros(len(weights_DW)),
        weights_DW.unflatten(1, shape),
        trained.bias_W.clone().unflatten(0, shape),
        classes_C,
    )
