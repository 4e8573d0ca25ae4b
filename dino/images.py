"""The prepared table of images: write it, open it, decode a batch of it as uint8.

One Arrow IPC stream file, memory-mapped, with columns `id: string` and `image: struct<bytes: binary,
path: string>` (what Hugging Face `datasets` reads with an Image feature), rows sorted by id; no labels.

Legend: B images of a batch, N of the table, C channels (1 grey, 3 RGB), H height, W width; pixels are uint8.
"""

import hashlib
import json
import math
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dino.decode import MAX_PIXELS, THREADS_FROM_BYTES, decode_image, extension
from dino.files import whole_file

BATCH_ROWS = 1024  # of an Arrow record batch ...
BATCH_BYTES = 64 << 20  # ... which ends earlier at this size, so that memory stays bounded
CACHE_BYTES = 1 << 30  # tables of one image size, smaller than this when decoded, are decoded once
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FACTS = ("channels", "mean", "std", "max_pixels")
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's own
NO_TABLE = (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError)
FEATURES = {"id": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}


class ImageBatch(NamedTuple):
    """Images as uint8, padded at the bottom and the right with 0 to the largest of the batch."""

    pixels_BCHW: Tensor  # uint8
    sizes_B2: Tensor  # int64: height and width of each image, without the padding


def write_image_table(
    path: str | Path,
    rows: Iterable[tuple[str, bytes]],
    *,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    max_pixels: int = MAX_PIXELS,
    needs_bytes: int = 0,
) -> None:
    """Write (id, encoded image) rows, which come sorted by id; the file appears whole or not at all.

    Args:
        channels: 1 or 3, to which images are decoded.
        mean, std: [C] of the training split's pixels in 0..1; the same in the tables of all splits.
        max_pixels: of an image; whoever decodes the table refuses larger ones.
        needs_bytes: of all encoded images together, if known: said when the disk has no room for them.
    """
    assert channels in (1, 3) and len(mean) == len(std) == channels
    facts = {"channels": channels, "mean": list(map(float, mean)), "std": list(map(float, std))}
    facts |= {"max_pixels": max_pixels}
    schema = pa.schema(
        [("id", pa.string()), ("image", IMAGE_TYPE)],
        metadata={"huggingface": json.dumps({"info": {"features": FEATURES}}), "dino": json.dumps(facts)},
    )
    with (
        whole_file(path, needs_bytes) as aside,
        pa.OSFile(str(aside), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for ids, images in _record_batches(rows):
            names = [image_id + extension(data) for image_id, data in zip(ids, images, strict=True)]
            image = pa.StructArray.from_arrays(
                [pa.array(images, pa.binary()), pa.array(names, pa.string())], fields=list(IMAGE_TYPE)
            )
            writer.write_batch(pa.record_batch([pa.array(ids, pa.string()), image], schema=schema))


def _record_batches(rows: Iterable[tuple[str, bytes]]) -> Iterator[tuple[list[str], list[bytes]]]:
    """Cut the rows into parts of bounded length and bytes."""
    ids: list[str] = []
    images: list[bytes] = []
    size, last = 0, ""
    for image_id, data in rows:
        assert last < image_id, f"rows not sorted by id, or an id twice: {last} before {image_id}"
        ids.append(image_id)
        images.append(data)
        size, last = size + len(data), image_id
        if len(ids) == BATCH_ROWS or size >= BATCH_BYTES:
            yield ids, images
            ids, images, size = [], [], 0
    if ids:
        yield ids, images


class ImageTable:
    """A prepared table, memory-mapped; usable from several threads, and picklable (by its path).

    Attributes:
        ids: id of each row, sorted.
        channels: 1 (grey) or 3 (RGB), to which images are decoded.
        mean, std: [C] floats of the training split's pixels in 0..1.
        max_pixels: of an image; larger ones are refused undecoded.

    Raises:
        ValueError: there is no such file, or it is no whole table that `write_image_table` wrote.
    """

    ids: list[str]
    channels: int
    mean: list[float]
    std: list[float]
    max_pixels: int

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no image table at {self.path}; prepare the data first (`dvc repro prepare`)")
        try:
            table, facts = _read_table(self.path)
        except NO_TABLE as problem:
            raise ValueError(
                f"{self.path} is no image table, or a damaged one ({problem!r}); prepare the data again"
            ) from problem
        self.channels, self.mean, self.std, self.max_pixels = (facts[name] for name in FACTS)
        self.ids = table.column("id").to_pylist()
        self._chunks = [chunk.field("bytes") for chunk in table.column("image").chunks]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks]).tolist()
        large = self.path.stat().st_size >= THREADS_FROM_BYTES * max(len(self), 1)
        self._threads = min(os.cpu_count() or 1, 16) if large else 1
        self._cache = _Cache(len(self))

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[type["ImageTable"], tuple[Path]]:
        return ImageTable, (self.path,)

    def digest(self) -> str:
        """MD5 of the file, 32 hex digits; the same that DVC records for it."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

    def encoded(self, row: int) -> bytes:
        """The stored bytes of one image."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a table of {len(self)} images")
        chunk = bisect_right(self._ends, row)
        first = self._ends[chunk - 1] if chunk else 0
        data: bytes = self._chunks[chunk][row - first].as_py()
        return data

    def batch(self, rows: Sequence[int]) -> ImageBatch:
        """Decode these rows, in this order.

        Raises:
            ValueError: an image does not decode; the message names the file and the id.
        """
        rows = [int(row) for row in rows]
        pixels_BCHW = self._cache.take(rows, self._decode)
        if pixels_BCHW is None:
            return pad(self._decode(rows))
        sizes_B2 = torch.tensor([pixels_BCHW.shape[2:]], dtype=torch.int64).repeat(len(rows), 1)
        return ImageBatch(pixels_BCHW, sizes_B2)

    def _decode(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Uint8 [C, H, W] each."""
        if self._threads == 1 or len(rows) < 2:
            return [self._decode_row(row) for row in rows]
        with ThreadPoolExecutor(min(self._threads, len(rows))) as pool:
            return list(pool.map(self._decode_row, rows))

    def _decode_row(self, row: int) -> np.ndarray:
        try:
            return decode_image(self.encoded(row), self.channels, self.max_pixels)
        except ValueError as problem:
            raise ValueError(f"{self.path}: image {self.ids[row]}: {problem}; prepare the data again") from problem


def _read_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table, memory-mapped, and its facts, both as `write_image_table` wrote them; else an error of NO_TABLE."""
    with path.open("rb") as file:
        file.seek(-len(END_OF_STREAM), os.SEEK_END)
        if file.read() != END_OF_STREAM:  # Arrow takes a stream that is cut between two batches for a shorter one
            raise ValueError("its end is missing")
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        facts = json.loads((reader.schema.metadata or {})[b"dino"])
        table = reader.read_all()
    columns = {field.name: field.type for field in table.schema}
    if columns != {"id": pa.string(), "image": IMAGE_TYPE}:
        raise ValueError(f"its columns are {columns}")
    table.validate(full=True)
    ids, images = (table.column(name) for name in ("id", "image"))
    if ids.null_count or images.null_count or any(chunk.field("bytes").null_count for chunk in images.chunks):
        raise ValueError("an image or its id is missing")
    if not all(one < next_one for one, next_one in pairwise(ids.to_pylist())):
        raise ValueError("its rows are not sorted, or an id stands there twice")
    channels, mean, std, max_pixels = (facts[name] for name in FACTS)
    numbers = [*mean, *std]
    if not (
        (type(channels), type(max_pixels)) == (int, int)
        and channels in (1, 3)
        and max_pixels > 0
        and len(mean) == len(std) == channels
        and all(isinstance(number, float) and math.isfinite(number) for number in numbers)
        and min(std) > 0
    ):
        raise ValueError(f"its facts are {facts}")
    return table, facts


def pad(images: Sequence[np.ndarray]) -> ImageBatch:
    """Put images, uint8 [C, H, W] each, into one batch."""
    sizes_B2 = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64)
    height, width = sizes_B2.amax(0).tolist()
    pixels_BCHW = np.zeros((len(images), len(images[0]), height, width), dtype=np.uint8)
    for target_CHW, image in zip(pixels_BCHW, images, strict=True):
        target_CHW[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(torch.from_numpy(pixels_BCHW), sizes_B2)


class _Cache:
    """Decoded pixels of a small table whose images all have one size, filled as rows are asked for.

    At the first image of another size it closes for good and frees its memory. Filled and read by NumPy: batches are
    made in a thread beside the training, where an operation of torch would start a second team of OpenMP threads, and
    with more of them than cores every barrier of the training sleeps (measured: 518 to 532 images/s instead of 656).
    """

    def __init__(self, length: int):
        self.open = length > 0
        self.pixels_NCHW: np.ndarray | None = None
        self.known_N = np.zeros(length, dtype=bool)
        self.lock = threading.Lock()

    def take(self, rows: list[int], decode: Callable[[list[int]], list[np.ndarray]]) -> Tensor | None:
        """Pixels [B, C, H, W] of these rows, unknown ones decoded by `decode`; None once it is closed."""
        with self.lock:
            if self.open:
                missing = [row for row in dict.fromkeys(rows) if not self.known_N[row]]
                self._keep(missing, decode(missing))
            if not self.open or self.pixels_NCHW is None:
                return None
            return torch.from_numpy(self.pixels_NCHW[rows])

    def _keep(self, rows: list[int], images: list[np.ndarray]) -> None:
        for row, image in zip(rows, images, strict=True):
            if self.pixels_NCHW is None and len(self.known_N) * image.size < CACHE_BYTES:
                self.pixels_NCHW = np.empty((len(self.known_N), *image.shape), dtype=np.uint8)
            if self.pixels_NCHW is None or self.pixels_NCHW.shape[1:] != image.shape:
                self.open, self.pixels_NCHW = False, None
                return
            self.pixels_NCHW[row] = image
            self.known_N[row] = True
