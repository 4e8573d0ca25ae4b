"""Faults that happen to a stage, really made: what it says, what is left, and that running it again goes on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_disks import full_disk, small_files
from PIL import Image
from test_pretrain_stage import OUTS, Workplace
from told import ended, told

from dino.training_state import load_state
from pipelines.seconds import note_seconds, read_seconds
from pipelines.stages import prepare
from pipelines.stages import pretrain as pretrain_stage

REPOSITORY = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DINO_ROOT", "DINO_TRACEBACK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DINO_DEVICE", "cpu")


# A disk that is full


def photo(number: int, px: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (px, px, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()


def folder_of_photos(root: Path, px: int, count: int = 20) -> None:
    (root / "mine").mkdir(parents=True)
    for number in range(count):
        (root / "mine" / f"{number}.png").write_bytes(photo(number, px))
    text = (REPOSITORY / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("data/raw/fashion-mnist", "mine"))


@pytest.mark.parametrize("px", [200, 600], ids=["in the tables", "in the shrunk images aside"])
@pytest.mark.parametrize("disk", [full_disk, small_files])
def test_a_disk_that_is_full_leaves_no_half_prepared_table(
    px: int, disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder_of_photos(tmp_path, px)
    monkeypatch.chdir(tmp_path)
    with disk(tmp_path / "data/prepared"):
        words = told("prepare", prepare.main, tmp_path, capsys)
    assert words.startswith("no room for data/prepared/train.arrow: it needs ")
    if px == 200:
        assert "it needs 1.68 MB at least" in words  # all of the table: 14 photos


class Stopped:
    """In place of StopRequest: pytest's own signals stay as they are. Asks to stop after so many questions."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def train(place: Workplace, monkeypatch: pytest.MonkeyPatch, stop_after: int = 0) -> int:
    monkeypatch.chdir(place.root)
    monkeypatch.setattr(pretrain_stage, "StopRequest", lambda: Stopped(stop_after))
    return ended("pretrain", pretrain_stage.main)


def test_a_save_that_finds_no_room_ends_the_training_and_keeps_the_saves_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with full_disk(tmp_path / ".work", 8 << 20) as disk:
        place = Workplace(tmp_path)
        assert train(place, monkeypatch, stop_after=3) == 75
        (state,) = disk.glob("pretrain/*/state.safetensors")
        before = state.read_bytes()
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                try:
                    ballast.write(bytes(4096))
                except OSError:
                    break
        capsys.readouterr()
        words = told("pretrain", pretrain_stage.main, tmp_path, capsys)
        assert words.startswith(f"no room for {state.parent}/next.safetensors: it needs ") and "make room" in words
        assert state.read_bytes() == before and load_state(state)[0].step == 3
        assert sorted(path.name for path in state.parent.iterdir() if path.suffix == ".safetensors") == [
            "previous.safetensors",
            "state.safetensors",
        ]
        (disk / "ballast").unlink()
        place.set()
        assert train(place, monkeypatch) == 0
        assert "resuming after step 3" in capsys.readouterr().out
        assert all((tmp_path / out).is_file() for out in OUTS)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"prepare": "long"}', "\xff\x00"])
def test_a_damaged_note_of_seconds_fails_no_stage(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work/seconds.json").write_text(content, encoding="latin-1")
    assert read_seconds() == {}
    note_seconds("knn", 1.5)
    assert read_seconds() == {"knn": 1.5}


def test_seconds_that_can_not_be_noted_fail_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".work").write_text("a file")
    note_seconds("knn", 1.5)
    assert read_seconds() == {}
