"""Readers of the named sets' files, against files written value by value after their descriptions."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.datasets import read_cifar10, read_fashion_mnist, read_stl10, set_name
from pipelines.data.imageset import ImageSet


def pixel(image: int, channel: int, row: int, column: int) -> int:
    """Another value at each place."""
    return (image * 101 + channel * 59 + row * 7 + column * 3) % 256


def check_pixels(images: ImageSet, entry: int, number: int, height: int, width: int, channels: int) -> None:
    found = np.asarray(Image.open(io.BytesIO(images.read(entry)))).reshape(height, width, channels)
    for row, column, channel in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (height - 1, 2, channels - 1), (3, width - 1, 0)]:
        assert found[row, column, channel] == pixel(number, channel, row, column)


def test_fashion_mnist(tmp_path: Path) -> None:
    """idx: magic 0, 0, 8 (unsigned byte), dimensions; sizes, big-endian; values row by row."""
    for name, count in (("train", 5), ("t10k", 3)):
        first = 0 if name == "train" else 5
        values = [pixel(first + i, 0, r, c) for i in range(count) for r in range(28) for c in range(28)]
        head = b"\0\0\x08\x03" + struct.pack(">III", count, 28, 28)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(head + bytes(values))
        labels = [(first + i) % 10 for i in range(count)]
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", count) + bytes(labels))
    images = read_fashion_mnist(tmp_path)
    assert images.official and images.classes is not None and images.classes[9] == "Ankle boot"
    assert [entry.split for entry in images.entries] == ["train"] * 5 + ["test"] * 3
    assert [entry.label for entry in images.entries] == list(range(8))
    assert images.entries[6].source == "t10k-images[1]"
    for entry in range(8):
        check_pixels(images, entry, entry, 28, 28, 1)


def test_cifar10(tmp_path: Path) -> None:
    """A record: the label, 1,024 bytes of red row by row, of green, of blue."""
    for batch, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        data = b""
        for image in (2 * batch, 2 * batch + 1):
            data += bytes([image % 10])
            data += bytes(pixel(image, ch, r, c) for ch in range(3) for r in range(32) for c in range(32))
        (tmp_path / f"{name}.bin").write_bytes(data)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    images = read_cifar10(tmp_path)
    assert images.classes == names
    assert [entry.label for entry in images.entries] == [i % 10 for i in range(12)]
    assert [entry.split for entry in images.entries] == ["train"] * 10 + ["test"] * 2
    assert images.entries[3].source == "data_batch_2[1]"
    for entry in range(12):
        check_pixels(images, entry, entry, 32, 32, 3)


def test_stl10(tmp_path: Path) -> None:
    """An image: red, green, blue; each column by column. Labels count from 1."""
    number = 0
    for name, labels in (("train", [1, 10]), ("unlabeled", None), ("test", [2])):
        data = b""
        for _ in range(3 if labels is None else len(labels)):
            data += bytes(pixel(number, ch, r, c) for ch in range(3) for c in range(96) for r in range(96))
            number += 1
        (tmp_path / f"{name}_X.bin").write_bytes(data)
        if labels:
            (tmp_path / f"{name}_y.bin").write_bytes(bytes(labels))
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (tmp_path / "class_names.txt").write_text("\n".join(names) + "\n")
    images = read_stl10(tmp_path)
    assert images.classes == names
    assert [entry.label for entry in images.entries] == [0, 9, None, None, None, 1]
    assert [entry.split for entry in images.entries] == ["train"] * 5 + ["test"]
    assert images.entries[2].source == "unlabeled[0]"
    for entry in range(6):
        check_pixels(images, entry, entry, 96, 96, 3)


def test_a_missing_or_damaged_file_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_batch_1\.bin is missing; fetch the data set again"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match=r"3,072 bytes are no whole number of images; fetch"):
        read_cifar10(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"is no idx file of 3 dimensions; fetch"):
        read_fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + struct.pack(">III", 2, 28, 28) + bytes(784))
    with pytest.raises(ValueError, match=r"is shorter or longer than it says; fetch"):
        read_fashion_mnist(tmp_path)


def test_names_below_data_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set_name(Path("data/raw/cifar10")) == "cifar10"
    assert set_name(Path("./data/../data/raw/digits/")) == "digits"
    assert set_name(tmp_path / "data/raw/stl10") == "stl10"
    for own in ("photos", "data/photos", "/somewhere/data/raw/cifar10", "../raw/digits"):
        assert set_name(Path(own)) is None
    for wrong, near in (("fashion_mnist", "fashion-mnist"), ("CIFAR-10", "cifar10"), ("stl10/train", "stl10")):
        with pytest.raises(ValueError, match=rf"did you mean data/raw/{near}\? .*keep a folder of your own elsewhere"):
            set_name(Path("data/raw") / wrong)
    with pytest.raises(ValueError, match=r"'data/raw'\. Below data/raw are the named sets only \(fashion-mnist, "):
        set_name(Path("data/raw"))
