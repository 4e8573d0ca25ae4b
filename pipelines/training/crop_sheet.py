"""A sheet of crops: what the student and the teacher of a training really see, a row an image."""

from pathlib import Path

import torch
from PIL import Image

from dino.augment import multi_crop
from dino.config import PretrainConfig
from dino.files import whole_file
from dino.images import ImageTable
from pipelines.data.sheet import sample_sheet

SHEET_IMAGES = 8


def crop_sheet(table: ImageTable, config: PretrainConfig, path: Path) -> None:
    """Draw the first images of the table, each with its crops of step 0, as a PNG file."""
    count = min(SHEET_IMAGES, len(table))
    batch = table.batch(range(count))
    no_change = [0.0] * table.channels, [1.0] * table.channels
    crops = multi_crop(batch, config=config, step=0, rows=torch.arange(count), mean=no_change[0], std=no_change[1])
    rows = []
    for row, (pixels, size) in enumerate(zip(batch.pixels_BCHW, batch.sizes_B2.tolist(), strict=True)):
        views = [pixels[:, : size[0], : size[1]], *((crop[row] * 255).round().to(torch.uint8) for crop in crops)]
        rows.append((f"image {row + 1}", [_picture(view) for view in views]))
    with whole_file(path) as aside:
        aside.write_bytes(sample_sheet(rows))


def _picture(view_CHW: torch.Tensor) -> Image.Image:
    array = view_CHW.numpy()
    return Image.fromarray(array[0]) if len(array) == 1 else Image.fromarray(array.transpose(1, 2, 0))
