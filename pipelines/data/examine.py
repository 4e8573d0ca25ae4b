"""Every image of a set read once: is it whole, how large, grey or colour, its identity, the sums for mean and std.

Images larger than wanted are shrunk here, and only their new bytes are kept, in a file aside: memory stays bounded
whatever the size of the set.
"""

import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dino.decode import THREADS_FROM_BYTES, content_id, extension, open_image
from pipelines.data.imageset import ImageSet
from pipelines.data.png import encode_png

CHUNK_IMAGES = 32  # that a thread reads at a time
PROBES = 32  # images looked at to choose the number of threads
JPEG_QUALITY = 95
LOSSY = (".jpg", ".webp")  # these are shrunk to JPEG; others stay lossless, as PNG
LEVELS_AND_SQUARES = np.stack([np.arange(256), np.arange(256) ** 2], axis=1)  # int64 [256, 2]


class Limits(NamedTuple):
    """What images may be.

    Attributes:
        short_px: images with a larger short side are shrunk to it.
        pixels: images with more are left out, undecoded.
        aspect: so are images whose long side is more than so many times the short one.
    """

    short_px: int
    pixels: int
    aspect: float


class Facts(NamedTuple):
    """What one look at an image tells."""

    id: str
    grey: bool
    height: int  # as stored, like all that follows
    width: int
    sums: list[int]  # of the pixel values, per channel: one of a grey image, three of a colour image
    squares: list[int]  # of their squares
    brightest: int
    stored_bytes: int
    shrunk: bytes | None  # new bytes, if it was too large


def look(data: bytes, limits: Limits) -> Facts:
    """Decode an image, shrink it if its short side is too large, and take its facts.

    Raises:
        ValueError: it is no image, damaged, too large or too long.
    """
    image, shrunk = open_image(data, limits.pixels), None
    if max(image.size) > limits.aspect * min(image.size):
        raise ValueError(
            f"{image.width:,} x {image.height:,} pixels: longer than data.max_aspect ({limits.aspect:g}) times its "
            "short side; cut it, or raise that"
        )
    if min(image.size) > limits.short_px:
        shrunk = shrink(image, limits.short_px, lossy=extension(data) in LOSSY)
        image = open_image(shrunk)
    histogram_C256 = np.array(image.histogram(), dtype=np.int64).reshape(-1, 256)
    sums, squares = (histogram_C256 @ LEVELS_AND_SQUARES).T.tolist()
    return Facts(
        content_id(shrunk or data),
        image.mode == "L",
        image.height,
        image.width,
        sums,
        squares,
        int(np.flatnonzero(histogram_C256.sum(axis=0))[-1]),
        len(shrunk or data),
        shrunk,
    )


def shrink(image: Image.Image, short_px: int, *, lossy: bool) -> bytes:
    """Encode an image ("L" or "RGB") anew with this short side, in its proportions."""
    scale = short_px / min(image.size)
    size = max(round(image.width * scale), short_px), max(round(image.height * scale), short_px)
    small = image.resize(size, Image.Resampling.LANCZOS)
    if not lossy:
        return encode_png(np.asarray(small))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


class Examined:
    """Facts of every image of a set (row: index of its entry), and access to the bytes to be stored.

    The sums are of integers, hence exact: no order of threads changes mean and std.

    Attributes:
        broken: row -> what is wrong; the other attributes mean nothing for these rows.
        ids: content id of each row.
        grey_N: bool.
        sizes_N2: int64, height and width as stored.
        stored_bytes_N: int64, of the encoded image as stored.
        brightest: largest pixel value of all.
        shrunk: how many images were.
    """

    def __init__(self, images: ImageSet, spool: io.FileIO):
        count = len(images.entries)
        self.images = images
        self.broken: dict[int, str] = {}
        self.ids = [""] * count
        self.grey_N = np.zeros(count, dtype=bool)
        self.sizes_N2 = np.zeros((count, 2), dtype=np.int64)
        self.stored_bytes_N = np.zeros(count, dtype=np.int64)
        self.brightest = 0
        self._sums_N3 = np.zeros((count, 3), dtype=np.int64)
        self._squares_N3 = np.zeros((count, 3), dtype=np.int64)
        self._spool = spool
        self._spooled: dict[int, tuple[int, int]] = {}  # row -> offset, length

    @property
    def shrunk(self) -> int:
        """How many images were shrunk."""
        return len(self._spooled)

    def add(self, row: int, facts: Facts) -> None:
        """Take the facts of one image."""
        self.ids[row] = facts.id
        self.grey_N[row] = facts.grey
        self.sizes_N2[row] = facts.height, facts.width
        self.stored_bytes_N[row] = facts.stored_bytes
        self._sums_N3[row] = facts.sums  # a grey image's one goes into all three
        self._squares_N3[row] = facts.squares
        self.brightest = max(self.brightest, facts.brightest)
        if facts.shrunk is not None:
            self._spooled[row] = self._spool.tell(), len(facts.shrunk)
            unwritten = memoryview(facts.shrunk)
            while unwritten:
                unwritten = unwritten[self._spool.write(unwritten) :]

    def read(self, row: int) -> bytes:
        """Bytes of an image as the table stores them.

        Raises:
            ValueError: the file changed since it was examined.
        """
        if row in self._spooled:
            offset, length = self._spooled[row]
            return os.pread(self._spool.fileno(), length, offset)
        data = self.images.read(row)
        if content_id(data) != self.ids[row]:
            raise ValueError(f"{self.images.entries[row].source} changed while it was read; run the stage again")
        return data

    def mean_std(self, rows: Sequence[int], channels: int) -> tuple[list[float], list[float]]:
        """Per channel over all pixels (0..1) of these rows; a flat colour's std of 0 becomes one grey level."""
        pixels = int(self.sizes_N2[rows].prod(axis=1).sum())
        mean, std = [], []
        for channel in range(channels):
            total = int(self._sums_N3[rows, channel].sum())
            squares = int(self._squares_N3[rows, channel].sum())
            mean.append(total / (255 * pixels))
            std.append(max(math.sqrt(squares * pixels - total**2) / (255 * pixels), 1 / 255))
        return mean, std


def examine(images: ImageSet, *, limits: Limits, spool: io.FileIO, advance: Callable[[int], None]) -> Examined:
    """Read every image of the set, in threads where images are large.

    Args:
        images: the set.
        limits: what images may be.
        spool: an empty file, open for writing and reading without a buffer, for the bytes of shrunk images.
        advance: called with the number of further images that were read.
    """

    def look_at(rows: range) -> list[Facts | str]:
        return [_look_or_reason(images, row, limits) for row in rows]

    examined = Examined(images, spool)
    chunks = (
        range(first, min(first + CHUNK_IMAGES, len(images.entries)))
        for first in range(0, len(images.entries), CHUNK_IMAGES)
    )
    for rows, results in _map_in_order(look_at, chunks, threads=_threads(images)):
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, str):
                examined.broken[row] = result
            else:
                examined.add(row, result)
        advance(len(rows))
    return examined


def _look_or_reason(images: ImageSet, row: int, limits: Limits) -> Facts | str:
    try:
        return look(images.read(row), limits)
    except (ValueError, OSError) as problem:  # OSError: a file that may not be read, or is gone
        return str(problem)


def _threads(images: ImageSet) -> int:
    """One where images are tiny: Python's lock is then most of the work, and threads only fight for it."""
    step = max(len(images.entries) // PROBES, 1)
    sizes = []
    for row in range(0, len(images.entries), step):
        try:
            sizes.append(len(images.read(row)))
        except (OSError, ValueError):
            continue
    return min(os.cpu_count() or 1, 16) if sizes and np.mean(sizes) >= THREADS_FROM_BYTES else 1


A = TypeVar("A")
B = TypeVar("B")


def _map_in_order(function: Callable[[A], B], items: Iterator[A], threads: int) -> Iterator[tuple[A, B]]:
    """Like map, in threads, with a bounded number of results waiting."""
    if threads == 1:
        for item in items:
            yield item, function(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[A, Future[B]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * threads:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()
