"""One encoded image: its pixels, its identity, its file extension.

Legend: C channels (1 grey, 3 RGB), H height, W width; pixels are uint8.

One decoder reads every format: Pillow, on which torchvision itself depends. Measured on 2 cores (Pillow 13.0,
torchvision 0.29.2): JPEG of 512 x 683 about 700 images/s against 260 by `torchvision.io`, PNG of 28 x 28
about 23,000 against 34,000; and `torchvision.io` is deprecated since 0.29.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 80_000_000  # of an image, unless the caller says otherwise: what is larger is refused by its header
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
GREY_16_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
THREADS_FROM_BYTES = 8192  # mean encoded size from which on decoding is long enough to pay for threads
ORIENTATION = 0x0112  # EXIF tag; 1: upright
_MODES = {1: "L", 3: "RGB"}
_MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"BM": ".bmp",
    b"II*\x00": ".tiff",
    b"MM\x00*": ".tiff",
    b"GIF8": ".gif",
}


@cache
def _silence_pillow() -> None:
    """It warns of images beyond half its limit; ours is chosen by the user and enforced at every door."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an encoded image as `standard_image` makes it. Of an animation, the first frame.

    Args:
        data: the file's content.
        max_pixels: more are refused before they are decoded: a file of some kilobytes can claim gigabytes.

    Raises:
        ValueError: it is not an image, is truncated, too large, or holds values that have no 8-bit meaning.
    """
    from PIL import Image, UnidentifiedImageError  # here: importing dino needs no decoder

    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _TooLargeError(f"{image.width:,} x {image.height:,} pixels")
            return standard_image(image)
    except MemoryError:
        raise
    except (_TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise ValueError(
            f"{problem}: more than data.max_pixels ({max_pixels:,}); raise that if it is no attack, or leave it out"
        ) from None
    except UnidentifiedImageError:
        raise ValueError("not an image (known are PNG, JPEG, WEBP, BMP, TIFF, GIF)") from None
    except Exception as problem:  # damaged files raise OSError, SyntaxError, struct.error ... in Pillow
        raise ValueError(f"not readable as an image: {problem}") from problem


class _TooLargeError(Exception):
    """More pixels than allowed."""


def standard_image(image: Image.Image) -> Image.Image:
    """Any image of Pillow: upright by its EXIF orientation, 8 bits, no alpha; mode "L" if grey, else "RGB".

    Transparency is laid on white. 16-bit grey is scaled to 8 bits over its full range, float grey (0..1)
    likewise.

    Raises:
        ValueError: it holds values that have no 8-bit meaning.
    """
    from PIL import ImageOps

    image.load()
    upright = image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    return _eight_bits(upright)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> "L" or "RGB"."""
    from PIL import Image

    if image.mode in ("L", "RGB"):
        if "transparency" not in image.info:
            return image
    elif image.mode == "1":
        return image.convert("L")
    elif image.mode in GREY_16_MODES or image.mode == "F":
        values = np.asarray(image)
        full = 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= full):
            raise ValueError(f"values from {values.min()} to {values.max()}; convert it to 8 bits, or to 0..{full:g}")
        return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8))
    elif image.mode == "P":
        palette = np.asarray(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        grey = bool((palette == palette[:, :1]).all())
        if "transparency" not in image.info:
            return image.convert("L" if grey else "RGB")
        return _on_white(image, grey)
    elif image.mode not in ("LA", "La", "RGBA", "RGBa", "PA"):
        return image.convert("RGB")  # CMYK, YCbCr, LAB, HSV
    return _on_white(image, grey=image.mode in ("L", "LA", "La"))


def _on_white(image: Image.Image, grey: bool) -> Image.Image:
    """White, not black: drawings and cut-outs are made for a page, and dark ones vanish on black."""
    from PIL import Image

    rgba = image.convert("RGBA")
    page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(page, rgba).convert("L" if grey else "RGB")


def decode_image(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image to uint8 [C, H, W]; `channels` as for `image_pixels`.

    Raises:
        ValueError: as `open_image`.
    """
    return image_pixels(open_image(data, max_pixels), channels)


def image_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Pixels of an image of mode "L" or "RGB", uint8 [C, H, W]; `channels` 1 (luma) or 3 (RGB; grey is repeated)."""
    pixels = np.asarray(image if image.mode == _MODES[channels] else image.convert(_MODES[channels]))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def extension(data: bytes) -> str:
    """File extension of an encoded image by its first bytes ("" if unknown)."""
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    return ".webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def content_id(data: bytes) -> str:
    """Identity of an image: the first 16 hex digits of the MD5 of its stored bytes."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()[:16]
