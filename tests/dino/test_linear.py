"""Laws of the linear evaluation: torch's own training one by one, torchvision's crops, ranks change nothing."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from dino import draws
from dino.augment import draw_boxes
from dino.backbones import seeded_backbone
from dino.distributed import World
from dino.images import ImageTable, write_image_table
from dino.linear import Crops, _beginning, evaluation_features, linear_features, random_crops, train_linear
from dino.regression import Classifiers
from dino.vision_transformer import VisionTransformer

ALONE = World(0, 1, torch.device("cpu"))
NORMALISED: dict[str, Any] = {"mean": [0.4], "std": [0.3]}
ARCH = {"family": "vit", "img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 3, "num_heads": 2}
LRS = [0.01, 0.3, 5.0]
SETTINGS: dict[str, Any] = {"lrs_at_256": LRS, "epochs": 3, "batch": 6, "momentum": 0.9, "seed": 7, **NORMALISED}
COUNT = 20  # images; batches of 6: the last of an epoch is smaller
DARKEST, BRIGHTEST = 30, 220


def make_table(path: Path, count: int = COUNT) -> ImageTable:
    """Grey images of many sizes, each brighter than the one before, with noise."""
    rng = np.random.default_rng(0)
    rows = []
    for number, level in enumerate(np.linspace(DARKEST, BRIGHTEST, count)):
        height, width = rng.integers(8, 30, 2)
        pixels = np.clip(level + rng.normal(0, 20, (height, width)), 0, 255).astype(np.uint8)
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, format="PNG")
            rows.append((f"{number:016x}", file.getvalue()))
    write_image_table(path, rows, channels=1, mean=[0.4], std=[0.3])
    return ImageTable(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return make_table(tmp_path_factory.mktemp("images") / "table.arrow")


def pixels_in_float64(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.double().flatten(1)


def labels_of(count: int, classes: int) -> Tensor:
    """Any labels, none of them 0..C-1; dark images have one, bright ones another."""
    return torch.arange(count) * classes // count * 1000 - 5


def last(epochs: Any) -> list[Classifiers]:
    *_, classifiers = epochs
    return list(classifiers)


@pytest.mark.parametrize("classes", [2, 3, 60])
def test_all_at_once_equal_torch_one_by_one(table: ImageTable, classes: int) -> None:
    """nn.Linear, SGD and CosineAnnealingLR in float64, on the features that each step was given."""
    rows, labels = torch.arange(COUNT), labels_of(COUNT, 2)
    if classes == 60:
        rows = rows.repeat(3)
        labels = torch.arange(60) * 10
    elif classes == 3:
        labels = labels_of(COUNT, 3)
    seen: list[Tensor] = []

    def features(images_BCHW: Tensor) -> Tensor:
        seen.append(pixels_in_float64(images_BCHW))
        return seen[-1]

    epochs = [
        found[0] for found in train_linear([features], table, rows, labels, crops=Crops(8), world=ALONE, **SETTINGS)
    ]
    values, columns = labels.unique(return_inverse=True)
    steps_per_epoch = math.ceil(len(rows) / 6)
    assert len(epochs) == 3 and len(seen) == 3 * steps_per_epoch
    for place, lr in enumerate(LRS):
        layer = nn.Linear(64, len(values), dtype=torch.float64)
        with torch.no_grad():
            drawn = torch.randn(64, len(values), generator=torch.Generator().manual_seed(7))
            layer.weight.copy_(0.01 * drawn.T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr * 6 / 256, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * steps_per_epoch, eta_min=0)
        for epoch in range(3):
            order = draws.epoch_order(7, epoch, len(rows))
            for step, batch in enumerate(order.split(6)):
                loss = nn.functional.cross_entropy(layer(seen[epoch * steps_per_epoch + step].clone()), columns[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            found = epochs[epoch]
            torch.testing.assert_close(found.weights_DSC[:, place].T, layer.weight.detach(), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found.bias_SC[place], layer.bias.detach(), rtol=1e-9, atol=1e-11)
            assert torch.equal(found.predict(seen[-1])[place], values[layer(seen[-1].clone()).argmax(1)])


def test_initial_weights_are_the_papers() -> None:
    wide = torch.zeros(1, 30_000)
    begun = _beginning(wide, [1.0, 2.0], 5, 0.9, 0)
    assert begun.weights_DW.std().item() == pytest.approx(0.01, rel=0.01)
    assert begun.weights_DW.mean().abs() < 1e-4
    assert not begun.bias_W.any()
    assert torch.equal(*begun.weights_DW.chunk(2, dim=1))


def test_crops_are_torchvisions_by_default() -> None:
    theirs, flip, ours = v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), Crops(8)
    assert (ours.scale, ours.ratio, ours.flip) == (theirs.scale, theirs.ratio, flip.p)
    assert InterpolationMode(theirs.interpolation) is InterpolationMode.BILINEAR and theirs.antialias


@pytest.mark.parametrize("px", [8, 40])
def test_crops_are_cut_resized_and_flipped_as_by_torchvision(table: ImageTable, px: int) -> None:
    images, rows = table.batch(range(COUNT)), torch.arange(COUNT)
    crops = random_crops(images, Crops(px), seed=3, epoch=2, rows=rows)
    uniform = draws.uniform(3, draws.LINEAR, 2, rows, 23)
    boxes = draw_boxes(uniform[:, :22], images.sizes_B2, (0.08, 1.0), (3 / 4, 4 / 3))
    flips = uniform[:, 22] < 0.5
    assert flips.any() and not flips.all()
    for crop, pixels, (height, width), box, flip in zip(
        crops, images.pixels_BCHW, images.sizes_B2.tolist(), boxes.tolist(), flips, strict=True
    ):
        image = pixels[:, :height, :width].float() / 255
        expected = tv.resized_crop(image, *box, [px, px], InterpolationMode.BILINEAR, antialias=True)
        expected = tv.horizontal_flip(expected) if flip else expected
        assert (crop - expected).abs().max() < 1e-4


def test_crops_depend_on_seed_epoch_and_row_alone(table: ImageTable) -> None:
    def crop(rows: list[int], seed: int = 0, epoch: int = 0) -> Tensor:
        return random_crops(table.batch(rows), Crops(8), seed=seed, epoch=epoch, rows=torch.tensor(rows))

    whole = crop(list(range(COUNT)))
    torch.testing.assert_close(crop([7, 3]), whole[[7, 3]])
    for other in (crop([7], epoch=1), crop([7], seed=1), whole[8:9]):
        assert not torch.allclose(other, whole[7:8])


def backbone() -> VisionTransformer:
    return seeded_backbone(ARCH, 0).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("patch_average", [False, True])
def test_features_are_cls_of_the_last_blocks_and_the_mean_patch(blocks: int, patch_average: bool) -> None:
    """Tokens caught behind each block, the final norm on each."""
    network, images = backbone(), torch.randn(5, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    caught: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        found = linear_features(network, blocks=blocks, patch_average=patch_average)(images)
        normed = [network.norm(tokens) for tokens in caught[:3]]
        expected = [tokens[:, 0] for tokens in normed[3 - blocks :]]
        expected += [normed[-1][:, 1:].mean(1)] if patch_average else []
        torch.testing.assert_close(found, torch.cat(expected, dim=1))
        assert found.shape == (5, 8 * (blocks + patch_average))
        last_cls = found[:, 8 * (blocks - 1) : 8 * blocks]
        torch.testing.assert_close(last_cls, network(images), rtol=1e-5, atol=1e-6)


def test_a_network_that_is_no_vit_gives_what_it_gives() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(linear_features(network, blocks=4, patch_average=True)(images), network(images))


@pytest.mark.parametrize("blocks", [0, 4])
def test_more_blocks_than_there_are_are_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"linear\.blocks is {blocks}, the network has 3; choose from 1 to that"):
        linear_features(backbone(), blocks=blocks, patch_average=False)


def test_it_learns_and_leaves_the_backbone_alone(table: ImageTable) -> None:
    network, rows, labels = backbone(), torch.arange(COUNT), labels_of(COUNT, 2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen = linear_features(network, blocks=3, patch_average=True)
    settings = SETTINGS | {"epochs": 30}
    (found,) = last(train_linear([seen], table, rows, labels, crops=Crops(8), world=ALONE, **settings))
    with torch.no_grad():
        features = evaluation_features(seen, resize_px=8, crop_px=8, **NORMALISED)(table.batch(range(COUNT)))
    assert max(found.right(features, labels)) >= 18  # type: ignore[type-var]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_backbones_beside_each_other_are_each_alone(table: ImageTable) -> None:
    """They see the same crops, and their classifiers do not know of each other."""
    rows, labels = torch.arange(COUNT), labels_of(COUNT, 3)

    def halved(images_BCHW: Tensor) -> Tensor:
        return pixels_in_float64(images_BCHW)[:, :32]

    def train(*backbones: Callable[[Tensor], Tensor]) -> list[Classifiers]:
        return last(train_linear(backbones, table, rows, labels, crops=Crops(8), world=ALONE, **SETTINGS))

    both, alone = train(pixels_in_float64, halved), [*train(pixels_in_float64), *train(halved)]
    for one, other in zip(both, alone, strict=True):
        assert torch.equal(one.weights_DSC, other.weights_DSC)


@pytest.mark.parametrize(("count", "batch"), [(1, 256), (3, 256), (6, 6), (7, 6)])
def test_each_image_counts_once_an_epoch_however_few(table: ImageTable, count: int, batch: int) -> None:
    rows, done = torch.arange(COUNT)[-count:], []
    seen: list[int] = []

    def features(images_BCHW: Tensor) -> Tensor:
        seen.append(len(images_BCHW))
        return pixels_in_float64(images_BCHW)

    settings = SETTINGS | {"batch": batch}
    last(
        train_linear(
            [features], table, rows, labels_of(count, 1), crops=Crops(8), world=ALONE, advance=done.append, **settings
        )
    )
    assert sum(seen) == sum(done) == 3 * count
    assert max(seen) <= batch


def test_what_was_given_out_after_an_epoch_stays(table: ImageTable) -> None:
    rows, labels = torch.arange(COUNT), labels_of(COUNT, 2)
    kept, copies = [], []
    for (found,) in train_linear([pixels_in_float64], table, rows, labels, crops=Crops(8), world=ALONE, **SETTINGS):
        kept.append(found.weights_DSC)
        copies.append(found.weights_DSC.clone())
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    assert not torch.equal(kept[0], kept[1])


def test_no_images_are_refused(table: ImageTable) -> None:
    none = torch.arange(0)
    with pytest.raises(ValueError, match="no labelled images"):
        last(train_linear([pixels_in_float64], table, none, none, crops=Crops(8), world=ALONE, **SETTINGS))


def two_kinds(world: World, table: ImageTable) -> list[tuple[Tensor, Tensor, int]]:
    """Trained on 13 images, batches of 6: of the last one image, one of two ranks has nothing."""
    seen: list[int] = []

    def features(images_BCHW: Tensor) -> Tensor:
        seen.append(len(images_BCHW))
        return pixels_in_float64(images_BCHW)

    network = linear_features(backbone(), blocks=2, patch_average=True)
    found = last(
        train_linear(
            [features, network], table, torch.arange(13), labels_of(13, 3), crops=Crops(8), world=world, **SETTINGS
        )
    )
    return [(classifiers.weights_DSC, classifiers.bias_SC, sum(seen)) for classifiers in found]


def test_two_ranks_train_what_one_trains(table: ImageTable, on_two_ranks) -> None:
    one, ranks = two_kinds(ALONE, table), on_two_ranks(two_kinds, table)
    assert sum(rank[0][2] for rank in ranks) == one[0][2] == 3 * 13
    for rank in ranks:
        for found, expected in zip(rank, one, strict=True):
            for tensor, other in zip(found[:2], expected[:2], strict=True):
                torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(ranks[0][1][0], ranks[1][1][0])
