"""PNG files that any reader reads, and whose bytes no library version changes."""

import hashlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.data.png import STORED_BYTES, encode_png


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (28, 28),
        (7, 13, 3),
        (5, 1, 3),
        (1, STORED_BYTES - 1),
        (1, STORED_BYTES),
        (2, STORED_BYTES),
        (300, 301, 3),
    ],
)
def test_pillow_reads_the_same_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = encode_png(pixels)
    zlib.decompress(data[data.index(b"IDAT") + 4 : -16])  # Pillow lets a stream without an end pass
    image = Image.open(io.BytesIO(data))
    image.load()  # checks the checksums
    assert image.mode == ("L" if len(shape) == 2 else "RGB")
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_bytes_depend_on_the_pixels_only() -> None:
    pixels = np.arange(28 * 28, dtype=np.int64).reshape(28, 28).astype(np.uint8)
    known = "628ca7b2872ee25b2c704fffec1e480a"
    assert hashlib.md5(encode_png(pixels)).hexdigest() == known
    assert encode_png(pixels) == encode_png(np.asfortranarray(pixels)) == encode_png(pixels[::-1][::-1])
