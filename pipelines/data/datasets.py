"""The named data sets, as `fetch` leaves them below data/raw: each image, its split and its class."""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines import paths
from pipelines.data.folders import read_folder
from pipelines.data.imageset import Entry, ImageSet
from pipelines.data.png import encode_png

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
STL_IMAGE_BYTES = 3 * 96 * 96


def read_fashion_mnist(folder: Path) -> ImageSet:
    """Four uncompressed idx files: 60,000 training and 10,000 test images of 28 x 28, grey."""
    parts = []
    for split, name in (("train", "train"), ("test", "t10k")):
        pixels_NHW = _idx(folder / f"{name}-images-idx3-ubyte", dimensions=3)
        labels_N = _idx(folder / f"{name}-labels-idx1-ubyte", dimensions=1)
        parts.append((f"{name}-images", split, pixels_NHW, labels_N))
    return _arrays("Fashion-MNIST", parts, FASHION_CLASSES)


def read_cifar10(folder: Path) -> ImageSet:
    """The binary version: 50,000 training and 10,000 test images of 32 x 32, RGB."""
    parts = []
    names = [("train", f"data_batch_{i}") for i in range(1, 6)] + [("test", "test_batch")]
    for split, name in names:
        records = _records(folder / f"{name}.bin", CIFAR_RECORD_BYTES)
        pixels_NHWC = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((name, split, pixels_NHWC, records[:, 0]))
    return _arrays("CIFAR-10", parts, _lines(folder / "batches.meta.txt"))


def read_stl10(folder: Path) -> ImageSet:
    """96 x 96, RGB: 5,000 training images, 100,000 without labels (for training too), 8,000 test images."""
    parts = []
    for split, name in (("train", "train"), ("train", "unlabeled"), ("test", "test")):
        columns_NCWH = _records(folder / f"{name}_X.bin", STL_IMAGE_BYTES).reshape(-1, 3, 96, 96)
        labels = folder / f"{name}_y.bin"
        labels_N = _records(labels, 1)[:, 0] - 1 if name != "unlabeled" else None  # counted from 1 in the file
        parts.append((name, split, columns_NCWH.transpose(0, 3, 2, 1), labels_N))
    return _arrays("STL-10", parts, _lines(folder / "class_names.txt"))


def read_digits(folder: Path) -> ImageSet:
    """scikit-learn's digits: train/ and test/ with a folder a class, 8 x 8, grey."""
    return replace(read_folder(folder), official=True)


NAMED: dict[str, Callable[[Path], ImageSet]] = {
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "stl10": read_stl10,
    "digits": read_digits,
}


def set_name(folder: Path) -> str | None:
    """The named set that a folder below data/raw stands for; None for a folder elsewhere.

    Raises:
        ValueError: the folder is data/raw or below it, but no named set.
    """
    absolute, raw = (Path(os.path.normpath(path.absolute())) for path in (folder, paths.RAW))
    if absolute != raw and raw not in absolute.parents:
        return None
    name = absolute.relative_to(raw).as_posix()
    if name not in NAMED:
        near = difflib.get_close_matches(name.lower(), NAMED, n=1, cutoff=0.4)
        raise ValueError(
            f"data.folder is '{folder}'"
            + (f"; did you mean {paths.RAW / near[0]}?" if near else ".")
            + f" Below {paths.RAW} are the named sets only ({', '.join(NAMED)}), as it is emptied and filled by the "
            "stage fetch: keep a folder of your own elsewhere"
        )
    return name


Part = tuple[str, str, np.ndarray, np.ndarray | None]


def _arrays(title: str, parts: Sequence[Part], classes: Sequence[str]) -> ImageSet:
    """Join parts, each (name, split, pixels uint8 [N, H, W] or [N, H, W, 3], labels [N] or None)."""
    entries: list[Entry] = []
    for name, split, pixels, labels_N in parts:
        labels = [None] * len(pixels) if labels_N is None else labels_N.tolist()
        if len(labels) != len(pixels) or any(x is not None and not 0 <= x < len(classes) for x in labels):
            raise ValueError(f"{title}: the labels of {name} do not fit its {len(pixels):,} images; {REFETCH}")
        entries += [Entry(f"{name}[{row}]", split, label) for row, label in enumerate(labels)]
    firsts = np.cumsum([0] + [len(pixels) for _, _, pixels, _ in parts])

    def read(index: int) -> bytes:
        part = int(np.searchsorted(firsts, index, side="right")) - 1
        return encode_png(parts[part][2][index - firsts[part]])

    return ImageSet(entries, list(classes), read, official=True, layout=title)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes, memory-mapped: magic 0x0000080D with D dimensions, their sizes, the bytes."""
    header = np.frombuffer(_head(path, 4 + 4 * dimensions), dtype=">u4")
    if len(header) != 1 + dimensions or header[0] != 0x0800 + dimensions:
        raise ValueError(f"{path} is no idx file of {dimensions} dimensions; {REFETCH}")
    shape = tuple(header[1:].tolist())
    if path.stat().st_size != header.nbytes + int(np.prod(shape)):
        raise ValueError(f"{path} is shorter or longer than it says; {REFETCH}")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=header.nbytes, shape=shape).view(np.ndarray)


def _records(path: Path, record_bytes: int) -> np.ndarray:
    """A file of records of equal length, memory-mapped: uint8 [N, record_bytes]."""
    size = path.stat().st_size if _head(path, 1) else 0
    if size == 0 or size % record_bytes:
        raise ValueError(f"{path}: {size:,} bytes are no whole number of images; {REFETCH}")
    records = np.memmap(path, dtype=np.uint8, mode="r", shape=(size // record_bytes, record_bytes))
    return records.view(np.ndarray)  # whose rows are cut out twice as fast


def _lines(path: Path) -> list[str]:
    return _head(path, 10_000).decode().split()


def _head(path: Path, count: int) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REFETCH}")
    with path.open("rb") as file:
        return file.read(count)


REFETCH = "fetch the data set again (`dvc repro -f -s fetch`)"
