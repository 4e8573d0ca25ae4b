"""Where Fashion-MNIST comes from: torchvision's mirrors, else Debian's package; checked either way."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dino.files import whole_file
from pipelines.data.download import UnreachableError, download

# Of the uncompressed files: gzip files of the same content differ from packer to packer.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE = "dataset-fashion-mnist"
PACKAGED = Path("usr/share/datasets/fashion-mnist")
APT_TIMEOUT_S = 300
APT_OPTIONS = ("-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20")


def fetch_fashion_mnist(
    target: Path,
    downloads: Path,
    *,
    mirrors: Sequence[str] | None = None,
    root: Path = Path("/"),
    sha256: Mapping[str, str] = SHA256,
) -> None:
    """Put the four uncompressed idx files into `target`.

    Args:
        target: an existing folder.
        downloads: where the gzip files are kept; good ones that lie there already are used.
        mirrors: addresses of folders; by default torchvision's.
        root: where Debian packages are installed.
        sha256: of each uncompressed file.

    Raises:
        ValueError: neither a mirror nor the package could be had.
    """
    try:
        _from_mirrors(downloads, mirrors, sha256)
    except UnreachableError as no_mirror:
        print(f"fetch: no mirror ({no_mirror}); trying Debian's package {PACKAGE}", flush=True)
        try:
            _from_debian(downloads, root, sha256)
        except UnreachableError as no_package:
            raise ValueError(
                f"Fashion-MNIST could not be had in either way. 1. torchvision's mirror: {no_mirror}. "
                f"2. The Debian package {PACKAGE}: {no_package}. Make one of them reachable (a proxy: set "
                "http_proxy; apt: run `apt-get update`, or install the package), or put "
                f"{', '.join(f'{name}.gz' for name in sha256)} into {downloads}"
            ) from None
    for name, expected in sha256.items():
        with whole_file(target / name) as aside:
            with gzip.open(downloads / f"{name}.gz") as packed, aside.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            assert _sha256(aside) == expected, f"{downloads / name}.gz changed while it was unpacked"


def _torchvision_mirrors() -> list[str]:
    from torchvision.datasets import FashionMNIST  # here: it takes seconds to import, and is rarely needed

    return list(FashionMNIST.mirrors)


def _from_mirrors(downloads: Path, mirrors: Sequence[str] | None, sha256: Mapping[str, str]) -> None:
    for name, expected in sha256.items():
        target, check = downloads / f"{name}.gz", partial(wrong_content, sha256=expected)
        if not target.is_file() or check(target):
            mirrors = _torchvision_mirrors() if mirrors is None else mirrors
            download([f"{mirror.rstrip('/')}/{name}.gz" for mirror in mirrors], target, check)


def _from_debian(downloads: Path, root: Path, sha256: Mapping[str, str]) -> None:
    """From the installed package, else by downloading it: neither needs to be root.

    Raises:
        UnreachableError: it is not installed and can't be downloaded, or holds other files.
    """
    with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as aside:
        place = root / PACKAGED
        if not place.is_dir():
            _run(["apt-get", *APT_OPTIONS, "download", PACKAGE], aside)
            _run(["dpkg-deb", "-x", *map(str, Path(aside).glob("*.deb")), "unpacked"], aside)
            place = Path(aside) / "unpacked" / PACKAGED
        for name, expected in sha256.items():
            if wrong := wrong_content(place / f"{name}.gz", expected):
                raise UnreachableError(f"{name}.gz: {wrong}")
            with whole_file(downloads / f"{name}.gz") as kept:
                shutil.copyfile(place / f"{name}.gz", kept)


def _run(command: Sequence[str], folder: str) -> None:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        subprocess.run(
            command, cwd=folder, env=environment, check=True, timeout=APT_TIMEOUT_S, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UnreachableError(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"{command[0]} took more than {APT_TIMEOUT_S} s") from None
    except subprocess.CalledProcessError as problem:
        lines = problem.stderr.strip().splitlines() or [f"exit code {problem.returncode}"]
        raise UnreachableError(f"{command[0]}: {lines[-1]}") from None


def wrong_content(packed: Path, sha256: str) -> str:
    """What is wrong with a gzip file whose content should have this SHA-256; "" if nothing."""
    try:
        with gzip.open(packed) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, EOFError, zlib.error) as problem:
        return f"no whole gzip file ({problem})"
    return "" if found == sha256 else f"its content has SHA-256 {found}, not {sha256}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
