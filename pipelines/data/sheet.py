"""A sheet of sample images: a row a class, or simply rows where there are no classes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipelines.pictures.drawing import png, style

TILE_PX, GAP_PX = 64, 6
PAPER = 255
INCHES_PER_PX = 1 / 100
NAME_LETTERS = 24


def sample_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> bytes:
    """Draw rows of images ("L" or "RGB"), each with its name ("": none), as a PNG file."""
    columns = max(len(images) for _, images in rows)
    pitch = TILE_PX + GAP_PX
    sheet_HW3 = np.full((len(rows) * pitch - GAP_PX, columns * pitch - GAP_PX, 3), PAPER, np.uint8)
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            tile = np.asarray(_tile(image))
            top = row * pitch + (TILE_PX - tile.shape[0]) // 2
            left = column * pitch + (TILE_PX - tile.shape[1]) // 2
            sheet_HW3[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    names = [name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…" for name, _ in rows]
    height, width = (length * INCHES_PER_PX for length in sheet_HW3.shape[:2])
    margin, room = 0.1, 0.1 + 0.085 * max(map(len, names))  # inches; room for the longest name
    with style():
        figure = Figure(figsize=(room + width + margin, height + 2 * margin))
        whole_width, whole_height = figure.get_size_inches()
        place = room / whole_width, margin / whole_height, width / whole_width, height / whole_height
        axes = figure.add_axes(place)
        axes.imshow(sheet_HW3, interpolation="nearest", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([row * pitch + TILE_PX / 2 for row in range(len(rows))], names)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        return png(figure, dpi=round(2 / INCHES_PER_PX))


def _tile(image: Image.Image) -> Image.Image:
    """The image so large that its long side fills a tile; magnified pixels stay squares."""
    scale = TILE_PX / max(image.size)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)
