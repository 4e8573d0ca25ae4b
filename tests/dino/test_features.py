"""Laws of feature extraction: rows in table order, one image at a time gives the same, ranks change nothing."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino.augment import eval_images
from dino.backbones import seeded_backbone
from dino.distributed import World
from dino.features import backbone_features, extract_features, feature_batches, pixel_features
from dino.images import ImageTable, write_image_table
from dino.vision_transformer import VisionTransformer

ALONE = World(0, 1, torch.device("cpu"))
ARCH = {"family": "vit", "img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
EVALUATION = {"resize_px": 10, "crop_px": 8}


def make_table(path: Path, sizes: list[tuple[int, int]]) -> ImageTable:
    """Grey noise of these heights and widths."""
    rng = np.random.default_rng(0)
    rows = []
    for number, size in enumerate(sizes):
        with io.BytesIO() as file:
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(file, format="PNG")
            rows.append((f"{number:016x}", file.getvalue()))
    write_image_table(path, rows, channels=1, mean=[0.4], std=[0.3])
    return ImageTable(path)


@pytest.fixture
def backbone() -> VisionTransformer:
    return seeded_backbone(ARCH, 0).eval()


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    return make_table(tmp_path / "table.arrow", [(12, 12), (9, 15), (20, 11), (12, 12), (8, 8), (30, 31), (10, 10)])


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_each_row_is_its_image_alone_in_table_order(backbone: VisionTransformer, table: ImageTable, batch: int) -> None:
    found_ND = extract_features(backbone, table, batch=batch, world=ALONE, **EVALUATION)
    extract = backbone_features(backbone, mean=[0.4], std=[0.3], **EVALUATION)
    alone_ND = torch.cat([extract(table.batch([row])).detach() for row in range(7)])
    assert found_ND.dtype == torch.float32
    assert not found_ND.requires_grad
    torch.testing.assert_close(found_ND, alone_ND, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone_ND[0], alone_ND[3])


def test_a_range_of_rows_and_several_extractors_see_the_same_images(
    backbone: VisionTransformer, table: ImageTable
) -> None:
    extractors = [backbone_features(backbone, mean=[0.4], std=[0.3], **EVALUATION), pixel_features(**EVALUATION)]
    parts = list(feature_batches(extractors, table, range(2, 6), batch=3, world=ALONE))
    assert [[len(features) for features in part] for part in parts] == [[3, 3], [1, 1]]
    whole_ND = extract_features(backbone, table, batch=7, world=ALONE, **EVALUATION)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole_ND[2:6], rtol=1e-5, atol=1e-6)
    assert list(feature_batches(extractors, table, range(0), batch=3, world=ALONE)) == []


def test_pixels_at_the_image_size_are_the_pixels(tmp_path: Path) -> None:
    table = make_table(tmp_path / "table.arrow", [(9, 9), (9, 12)])
    extract = pixel_features(resize_px=9, crop_px=9)
    found_ND = extract(table.batch([0, 1]))
    assert found_ND.dtype == torch.uint8
    assert torch.equal(found_ND[0].view(9, 9), table.batch([0]).pixels_BCHW[0, 0])
    assert torch.equal(found_ND[1].view(9, 9), table.batch([1]).pixels_BCHW[0, 0, :, 2:11])  # centre crop


def test_resized_pixels_are_rounded_to_the_nearest(table: ImageTable) -> None:
    images = table.batch(range(7))
    exact = eval_images(images, mean=[0.0], std=[1.0], **EVALUATION).flatten(1) * 255
    found = pixel_features(**EVALUATION)(images)
    assert (found - exact).abs().max() <= 0.5
    assert found.float().std() > 30


def extracted(world: World, table: ImageTable, batch: int) -> Tensor:
    return extract_features(seeded_backbone(ARCH, 0).eval(), table, batch=batch, world=world, **EVALUATION)


def test_two_ranks_give_the_rows_of_one(table: ImageTable, on_two_ranks) -> None:
    """Batches of 3 on each of 2 ranks: of the last image one rank has nothing."""
    one_ND = extracted(ALONE, table, 7)
    for found_ND in on_two_ranks(extracted, table, 3):
        torch.testing.assert_close(found_ND, one_ND, rtol=1e-5, atol=1e-6)


def test_a_crop_larger_than_the_image_is_refused(backbone: VisionTransformer, table: ImageTable) -> None:
    with pytest.raises(ValueError, match=r"crop_px \(12\) is larger than resize_px \(10\)"):
        extract_features(backbone, table, resize_px=10, crop_px=12, batch=3, world=ALONE)
