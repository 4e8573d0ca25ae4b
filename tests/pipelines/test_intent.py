"""The KEY of a training: what changes its result changes it, a file's name does not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dino.config import PretrainConfig
from dino.images import ImageTable, write_image_table
from pipelines.data.png import encode_png
from pipelines.training.intent import resolve

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    image = encode_png(torch.zeros(4, 4, dtype=torch.uint8).numpy())
    write_image_table(tmp_path / "train.arrow", [("0" * 16, image)], channels=1, mean=[0.4], std=[0.3])
    return ImageTable(tmp_path / "train.arrow")


def test_initial_weights_count_by_their_content(table: ImageTable, tmp_path: Path) -> None:
    first, moved, other = (tmp_path / name for name in ("first.pth", "moved.pth", "other.pth"))
    first.write_bytes(b"weights")
    shutil.copy(first, moved)
    other.write_bytes(b"weightz")
    random = PretrainConfig()
    keys = [resolve(random, table, CPU)[1]]
    keys += [resolve(replace(random, initial_weights=str(path)), table, CPU)[1] for path in (first, moved, other)]
    assert keys[1] == keys[2] and len(set(keys)) == 3
    with pytest.raises(ValueError, match=r"pretrain\.initial_weights is '.*gone\.pth': there is no such file"):
        resolve(replace(random, initial_weights=str(tmp_path / "gone.pth")), table, CPU)
