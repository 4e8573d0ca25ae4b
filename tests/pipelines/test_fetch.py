"""Named sets arrive whole and checked, from servers that work and servers that do not; other folders need nothing."""

import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import paths
from pipelines.data.archives import Archive, fetch_archive
from pipelines.data.datasets import read_digits
from pipelines.data.fashion_mnist import PACKAGED, SHA256, fetch_fashion_mnist, wrong_content
from pipelines.stages.fetch import fetch


class Server:
    """Serves a folder on 127.0.0.1 and counts what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        asked = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        handler = partial(Handler, directory=str(folder))
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.stop()


@pytest.fixture
def closed_url() -> str:
    """An address where nobody listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as once:
        return f"http://127.0.0.1:{once.server_address[1]}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DINO_ROOT", raising=False)
    return tmp_path / "repository"


# Small stand-ins for the four files, each with its SHA-256.
CONTENT = {name: name.encode() * 1000 for name in SHA256}
CONTENT_SHA256 = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}


def pack(folder: Path, level: int = 9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in CONTENT.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data, compresslevel=level))


def fashion(place: Path, mirrors: list[str], root: Path = Path("/nothing/is/installed/here")) -> dict[str, bytes]:
    target = place / "fashion"
    target.mkdir(exist_ok=True)
    fetch_fashion_mnist(target, place / "downloads", mirrors=mirrors, root=root, sha256=CONTENT_SHA256)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_fashion_mnist_from_the_first_mirror_that_works_and_only_once(
    place: Path, server: Server, closed_url: str
) -> None:
    pack(server.folder)
    mirrors = [closed_url, f"{server.url}/"]
    assert fashion(place, mirrors) == CONTENT
    assert sorted(server.requests) == sorted(f"/{name}.gz" for name in CONTENT)
    assert fashion(place, mirrors) == CONTENT
    assert len(server.requests) == 4, "what is there and good is not fetched again"
    (place / "downloads" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert fashion(place, mirrors) == CONTENT
    assert len(server.requests) == 5


def test_fashion_mnist_from_an_installed_debian_package(place: Path, tmp_path: Path, closed_url: str) -> None:
    pack(tmp_path / "root" / PACKAGED, level=1)  # packed otherwise: the content counts
    assert fashion(place, [closed_url], tmp_path / "root") == CONTENT


@pytest.mark.parametrize("damage", ["cut", "other", "html"])
def test_a_damaged_file_of_a_mirror_is_never_taken(
    place: Path, server: Server, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(server.folder)
    file = server.folder / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-9], "other": gzip.compress(b"other"), "html": b"<html>"}[damage])
    pack(tmp_path / "root" / PACKAGED)
    assert fashion(place, [server.url], tmp_path / "root") == CONTENT
    told = capsys.readouterr().out
    assert ("its content has SHA-256" if damage == "other" else "no whole gzip file") in told
    assert "trying Debian's package dataset-fashion-mnist" in told


def test_both_ways_closed_is_one_error_that_names_both(
    place: Path, closed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(ValueError) as error:
        fashion(place, [closed_url])
    text = str(error.value)
    assert f"torchvision's mirror: {closed_url}/train-images-idx3-ubyte.gz: [Errno" in text
    assert "Connection refused" in text
    assert "Debian package dataset-fashion-mnist: there is no apt-get on this machine" in text
    assert str(place / "downloads") in text and "http_proxy" in text
    assert not any(path.is_file() for path in place.rglob("*"))


def test_apt_without_the_package_is_said(place: Path, closed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real apt-get, told to know no sources (where there is one)."""
    (place / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "/dev/null"; Dir::State "{place}";'
        f'Dir::State::status "/dev/null"; Dir::Cache "{place}";'
    )
    monkeypatch.setenv("APT_CONFIG", str(place / "apt.conf"))
    with pytest.raises(ValueError, match=r"apt-get: E: Unable to locate package|there is no apt-get"):
        fashion(place, [closed_url])


def test_a_server_that_stops_in_the_middle_leaves_nothing(place: Path, server: Server) -> None:
    (server.folder / "a.bin").write_bytes(bytes(1000))
    archive = Archive("A", [f"{server.url}/a.bin"], hashlib.md5(bytes(2000)).hexdigest(), "a", [])
    with pytest.raises(ValueError, match=r"A could not be had: http.*/a\.bin: its MD5 is .*, or put a\.bin \(MD5"):
        fetch_archive(place, place / "downloads", archive)
    assert not list((place / "downloads").iterdir())


def tar(path: Path, folder: str, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_an_archive_gives_the_wanted_files_and_is_downloaded_once(place: Path, server: Server) -> None:
    files = {"b.bin": b"bb", "readme.html": b"...", "a.bin": b"a", "../../escape": b"no"}
    md5 = tar(server.folder / "set.tar.gz", "folder", files)
    archive = Archive("Set", [f"{server.url}/set.tar.gz"], md5, "folder", ["a.bin", "b.bin"])
    for _ in range(2):
        target = place / "set"
        target.mkdir(exist_ok=True)
        fetch_archive(target, place / "downloads", archive)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a.bin": b"a", "b.bin": b"bb"}
    assert server.requests == ["/set.tar.gz"]
    with pytest.raises(ValueError, match=r"set\.tar\.gz lacks folder/c\.bin; delete it"):
        fetch_archive(target, place / "downloads", Archive("Set", archive.urls, md5, "folder", ["a.bin", "c.bin"]))


def test_digits_need_no_network(place: Path) -> None:
    fetch(Path("data/raw/digits"))
    images = read_digits(place / "data/raw/digits")
    assert images.classes == list("0123456789") and images.official
    assert [sum(entry.split == split for entry in images.entries) for split in ("train", "test")] == [1437, 360]
    zero = np.asarray(Image.open(io.BytesIO((place / "data/raw/digits/test/0/0000.png").read_bytes())))
    assert zero[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0, 0, 5, 13, 9, 1, 0, 0 of 16


def test_a_folder_of_ones_own_leaves_data_raw_empty(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(Path("data/raw/digits"))
    (place / "own").mkdir()
    fetch(place / "own")
    assert list(paths.RAW.iterdir()) == []
    assert "nothing to fetch" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_told_and_loses_nothing(place: Path) -> None:
    fetch(Path("data/raw/digits"))
    with pytest.raises(
        ValueError, match=r"data\.folder is '/somewhere/else', and there is no such folder.*params\.yaml"
    ):
        fetch(Path("/somewhere/else"))
    assert (paths.RAW / "digits").is_dir()


def test_what_fetch_leaves_depends_on_the_name_only(place: Path) -> None:
    def tree() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(paths.RAW.rglob("*")) if path.is_file()}

    fetch(Path("data/raw/digits"))
    first = tree()
    (paths.RAW / "digits" / "train" / "stray.png").write_bytes(b"")
    (paths.RAW / "cifar10").mkdir()
    fetch(Path("data/raw/digits"))
    assert tree() == first and [path.name for path in paths.RAW.iterdir()] == ["digits"]


def test_an_unknown_name_is_an_error(place: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean data/raw/fashion-mnist\?"):
        fetch(Path("data/raw/fashionmnist"))


@pytest.mark.acceptance
def test_the_real_fashion_mnist(place: Path) -> None:
    """By whatever way this machine has."""
    fetch(Path("data/raw/fashion-mnist"))
    for name, sha256 in SHA256.items():
        data = (paths.RAW / "fashion-mnist" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256
        assert not wrong_content(place / ".work/downloads/fashion-mnist" / f"{name}.gz", sha256)
