"""Faults that happen to a stage, really made: what it says, what is left, and that running it again goes on."""

import contextlib
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from faulty_disks import full_disk, small_files
from PIL import Image
from test_pretrain_stage import OUTS, STEPS, STEPS_PER_EPOCH, Workplace, wait_for
from tiny import digits, write_table
from told import ended, told

from dino.training_state import load_state
from pipelines import paths
from pipelines.processes.seconds import note_seconds, read_seconds
from pipelines.stages import prepare
from pipelines.stages import pretrain as pretrain_stage

LITTLE = 80  # MB beyond what the process has when it begins
MORE = 80  # MB that the whole stage takes beyond what was tried
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
        place.save_steps = 1000
        place.set()
        assert train(place, monkeypatch) == 0
        assert "resuming after step 3" in capsys.readouterr().out
        assert all((tmp_path / out).is_file() for out in OUTS)


# Arithmetic


def test_a_training_that_diverges_names_its_step_and_keeps_the_last_good_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    place = Workplace(tmp_path, lr_at_256=1e41, warmup_epochs=2)  # a first step of rate 0 is saved
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain_stage, "StopRequest", lambda: Stopped(0))
    words = told("pretrain", pretrain_stage.main, tmp_path, capsys)
    found = re.match(r"step (\d+): .* not finite\. .*pretrain\.lr_at_256.* The last good save stays", words)
    assert found, words
    saved = [load_state(path)[0] for path in (tmp_path / ".work/pretrain").glob("*/*.safetensors") if path.is_file()]
    assert max(state.step for state in saved) == int(found[1]) - 1 == place.saved_step()
    assert all(tensor.isfinite().all() for state in saved for tensor in state.tensors.values())


# A damaged image in the middle of a training


def test_an_image_that_does_not_decode_ends_the_training_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Loaders are threads of the trainer: there is no worker process to lose, and their errors are the trainer's."""
    place = Workplace(tmp_path)
    images = digits(160)
    write_table(tmp_path / paths.TRAIN_IMAGES, [*images[1:], images[0][:-30]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain_stage, "StopRequest", lambda: Stopped(0))
    words = told("pretrain", pretrain_stage.main, tmp_path, capsys)
    broken = hashlib.md5(images[0][:-30]).hexdigest()[:16]
    assert words.startswith(f"data/prepared/train.arrow: image {broken}: not readable as an image")
    assert "prepare the data again" in words
    assert 0 < place.saved_step() < STEPS_PER_EPOCH, "not in the middle"


# Memory


def allocations_that_fail() -> list[Callable[[], object]]:
    return [lambda: torch.empty(1 << 55, dtype=torch.uint8), lambda: np.zeros(1 << 55, np.uint8),
            lambda: pa.allocate_buffer(1 << 55), lambda: bytearray(1 << 60)]  # fmt: skip


@pytest.mark.parametrize("number", range(4))
def test_an_allocation_that_fails_is_told_without_a_traceback(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    Workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = told("knn", lambda params: allocations_that_fail()[number](), tmp_path, capsys)
    assert words.startswith("out of memory (") and "; free memory, or take a machine with more" in words


def test_another_error_of_the_code_shows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="dtype"):
        ended("knn", lambda params: torch.zeros(2, 3) @ torch.zeros(3, 2, dtype=torch.int64))


SHORT = """
import resource, sys
from pipelines import params
from pipelines.processes.stage import run_stage
from pipelines.stages import pretrain
from dino import fitting  # all is imported before memory gets short, and what an optimizer imports
import torch._dynamo
import torch
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = (int(size.split()[1]) << 10) + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run_stage("pretrain", pretrain.main)
"""


@pytest.mark.acceptance
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's address space")
def test_a_batch_that_does_not_fit_gets_a_number_of_micro_batches_that_was_tried(tmp_path: Path) -> None:
    """With a real limit on memory; with that number the training passes, whose stage takes a little more."""
    settings = {"batch": 160, "global_px": 64, "local_px": 32, "patch_size": 16, "epochs": 2}
    place = Workplace(tmp_path, **settings)

    def run(megabytes: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", SHORT, str(megabytes)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DINO_DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        return done.returncode, done.stderr

    code, words = run(LITTLE)
    assert code == 1 and "Traceback" not in words, words
    found = re.search(r"out of memory \(.*\): set pretrain\.micro_batches to (\d+) \(now 1\)", words)
    assert found, words
    code, _ = run(LITTLE + MORE)
    assert code == 1, "the limit does not bind"
    place.set(**settings, micro_batches=int(found[1]))
    code, words = run(LITTLE + MORE)
    assert code == 0, f"what was recommended does not fit: {words}"


# A rank that is killed


@pytest.mark.acceptance
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
def test_a_killed_rank_ends_all_and_the_next_run_resumes(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = place.start(0, 1, *torchrun)
    wait_for(process, lambda: place.saved_step() >= 3)
    (rank,) = [pid for pid, variables in processes_in(tmp_path).items() if b"RANK=1" in variables]
    os.kill(rank, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "another process of this run has ended" in err and "run the same command again" in err
    assert not processes_in(tmp_path)
    saved = place.saved_step()
    assert 3 <= saved < STEPS
    code, out, err = place.run(0, 1, *torchrun)
    assert code == 0 and f"resuming after step {saved}" in out, err


def processes_in(folder: Path) -> dict[int, list[bytes]]:
    """Processes whose working directory it is, with their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve() == folder.resolve():
                found[int(process.name)] = (process / "environ").read_bytes().split(b"\0")
    return found


# Notes beside the results


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
