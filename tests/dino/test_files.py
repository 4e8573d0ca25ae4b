"""Laws of files that appear whole, on disks that are really full, read-only or in the way."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_disks import full_disk, small_files

from dino.checkpoint import load_tensors, save_tensors
from dino.files import in_bytes, whole_file
from dino.images import ImageTable, write_image_table

FILE_BYTES = 5 << 20


@pytest.fixture(params=[full_disk, small_files])
def no_room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with request.param(tmp_path / "disk") as folder:
        yield folder


def a_checkpoint(path: Path, size: int) -> None:
    save_tensors(path, {"w": torch.zeros(size // 4)}, {})


def a_table(path: Path, size: int) -> None:
    rows = ((f"{i:04}", os.urandom(size // 100)) for i in range(100))
    write_image_table(path, rows, channels=3, mean=[0.5] * 3, std=[0.5] * 3, needs_bytes=size)


def features(path: Path, size: int) -> None:
    from pipelines.evaluation.feature_file import feature_writer

    noise = np.random.default_rng(0).normal(size=(100, size // 4000)).astype(np.float32)
    with feature_writer(path, kind="trained", key="k") as write:
        for part in range(10):
            write("train", [f"{part}-{i}" for i in range(100)], noise)


def metrics(path: Path, size: int) -> None:
    from pipelines.rows.tracking import write_metrics

    write_metrics(path, {"many": "9" * size})


WRITERS = [a_checkpoint, a_table, features, metrics]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_full_disk_leaves_the_old_file_and_says_what_is_needed(write: Any, no_room: Path) -> None:
    path = no_room / "new" / "file.out"
    write(path, 10_000)
    before = path.read_bytes()
    with pytest.raises(OSError) as told:
        write(path, FILE_BYTES)
    message = str(told.value)
    assert message.startswith(f"no room for {path}: it needs ") and "run it again" in message
    assert ("ulimit -f" in message) != ("are free in" in message)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["file.out"]
    if write in (a_checkpoint, a_table):  # whose size is known before
        assert "it needs 5.24 MB at least" in message
    write(path, 20_000)  # there is room for it still


def test_tables_and_checkpoints_written_into_the_last_room_are_whole(no_room: Path) -> None:
    a_table(no_room / "t.arrow", 600_000)
    a_checkpoint(no_room / "c.safetensors", 300_000)
    assert len(ImageTable(no_room / "t.arrow")) == 100
    assert load_tensors(no_room / "c.safetensors")[0]["w"].numel() == 75_000


@contextmanager
def another_user(path: Path) -> Iterator[None]:
    path.parent.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: root may write everywhere
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def read_only_disk(path: Path) -> Iterator[None]:
    folder = path.parent
    for options in ([], ["-o", "remount,ro"]):
        if subprocess.run(["mount", "--bind", *options, folder, folder], capture_output=True).returncode:
            pytest.skip("only root may mount a read-only disk")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def a_file_for_its_folder(path: Path) -> Iterator[None]:
    path.parent.rmdir()
    path.parent.write_text("no folder")
    yield


@contextmanager
def a_file_further_up(path: Path) -> Iterator[None]:
    path.parent.rmdir()
    path.parent.parent.rmdir()
    path.parent.parent.write_text("no folder")
    yield


@contextmanager
def a_folder_of_its_name(path: Path) -> Iterator[None]:
    path.mkdir()
    yield


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (another_user, "permission denied"),
        (read_only_disk, "read-only file system"),
        (a_file_for_its_folder, "file exists"),
        (a_file_further_up, "not a directory"),
        (a_folder_of_its_name, "a folder has this name"),
    ],
)
def test_a_place_that_takes_no_file_is_told_before_the_work(spoiled: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "file.out"
    path.parent.mkdir(parents=True)
    worked = False
    with spoiled(path), pytest.raises(OSError) as told, whole_file(path):
        worked = True
    assert str(told.value).startswith(f"can't write {path}: {words}") and "; make " in str(told.value)
    assert not worked
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


def test_an_error_of_the_work_itself_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole_file(tmp_path / "a"):
        (tmp_path / "elsewhere").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (5 << 20, "5.24 MB"), (3e12, "3 TB"), (9e15, "9e+03 TB")],
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_bytes(count) == words
