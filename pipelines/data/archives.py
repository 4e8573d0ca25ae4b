"""Data sets that come as one tar archive: downloaded once, checked by MD5, the files we read taken out."""

import hashlib
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino.files import whole_file
from pipelines.data.download import UnreachableError, download


@dataclass(frozen=True)
class Archive:
    """A tar.gz archive on the network, and the files wanted from its one folder."""

    title: str
    urls: Sequence[str]
    md5: str
    folder: str
    members: Sequence[str]


CIFAR10 = Archive(  # the binary version: the Python one is a pickle, which may run code
    title="CIFAR-10",
    urls=["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    members=[*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"],
)
STL10 = Archive(  # address and MD5 as in torchvision
    title="STL-10",
    urls=["http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"],
    md5="91f7769df0f17e558f3565bffb0c7dfb",
    folder="stl10_binary",
    members=["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin", "class_names.txt"],
)


def fetch_archive(target: Path, downloads: Path, archive: Archive) -> None:
    """Put the wanted files into the existing folder `target`; the archive stays in `downloads`.

    Raises:
        ValueError: the archive can't be had, or lacks a file.
    """
    packed = downloads / Path(archive.urls[0]).name
    try:
        download(archive.urls, packed, lambda path: wrong_md5(path, archive.md5))
    except UnreachableError as problem:
        raise ValueError(
            f"{archive.title} could not be had: {problem}. Make the address reachable (a proxy: set http_proxy and "
            f"https_proxy), or put {packed.name} (MD5 {archive.md5}) into {downloads}"
        ) from None
    wanted = {f"{archive.folder}/{name}": name for name in archive.members}
    with tarfile.open(packed) as tar:  # read in the archive's order: it is one compressed stream
        for member in tar:
            if (name := wanted.pop(member.name.removeprefix("./"), None)) and (packed_file := tar.extractfile(member)):
                with whole_file(target / name) as aside, aside.open("wb") as file:
                    shutil.copyfileobj(packed_file, file, 1 << 20)
    if wanted:
        raise ValueError(f"{packed} lacks {', '.join(wanted)}; delete it and run again")


def wrong_md5(path: Path, md5: str) -> str:
    """What is wrong with a file that should have this MD5; "" if nothing."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return "" if found == md5 else f"its MD5 is {found}, not {md5}: incomplete, or another file"
