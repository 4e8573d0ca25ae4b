"""Whatever ends dvc, make, the flow or torchrun, and however: the trainer saves, and no process is left."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tiny import SETTINGS, digits, write_table
from toy import wait_until

from dino.training_state import load_state
from pipelines.processes.scratch import copy_repository

PROJECT = Path(__file__).parents[2]
LONG = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
LONG |= {"epochs": 100_000, "snapshot_epochs": 100_000, "depth": 1}
NEVER = {"save_minutes": 1e6, "save_steps": None}  # so what is saved, was saved on the way out
DVC = [sys.executable, "-P", "-m", "dvc", "repro", "-s", "pretrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SEVERAL: dict[str, str] = {}  # DINO_PROCESSES, where a test wants it
MAKE = ["make", "-o", ".venv/.installed", "run"]
FLOW = [sys.executable, "-m", "pipelines.flow", "pretrain"]


def settings(folder: str) -> dict[str, dict[str, object]]:
    runtime = {"tracking": {"enabled": False}, "pretrain": NEVER, "wait_for_lock_minutes": 2.0}
    return {"data": {"folder": folder}, "pretrain": LONG, "runtime": runtime}


@pytest.fixture(scope="module")
def table_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a prepared table: enough for `dvc repro -s pretrain`."""
    root = tmp_path_factory.mktemp("table")
    copy_repository(root, settings("data/raw/digits"), PROJECT)
    write_table(root / "data/prepared/train.arrow", digits(30))
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which everything before the training has run."""
    root = tmp_path_factory.mktemp("prepared")
    copy_repository(root, settings("data/raw/digits"), PROJECT)
    done = subprocess.run([*DVC[:-2], "prepare"], cwd=root, env=environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def environment(root: Path) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("DINO_", "DVC_", "PREFECT_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"PATH": path, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return (
        outside
        | ours
        | SEVERAL
        | {"DINO_PROGRESS_SECONDS": "0", "DINO_DEVICE": "cpu", "PREFECT_HOME": str(root / "prefect")}
    )


class Command:
    """A running command, its words, and every process below it."""

    def __init__(self, root: Path, command: list[str]) -> None:
        self.root = root
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=environment(root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)  # to its end: when every process has closed it

    def has_said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines[:])

    def trains(self) -> list[psutil.Process]:
        """Wait until it does; all processes below it."""

        def does() -> bool:
            assert self.process.poll() is None, self.lines
            return self.has_said(r"pretrain\b.* (1[0-9]|[2-9][0-9]|\d{3,}) of [\d,]+ images")

        wait_until(does, 300)
        return psutil.Process(self.process.pid).children(recursive=True)

    def saved_step(self) -> int:
        (path,) = self.root.glob(".work/pretrain/*/state.safetensors")
        return load_state(path)[0].step


@contextmanager
def running(root: Path, command: list[str]) -> Iterator[Command]:
    started = Command(root, command)
    try:
        yield started
    finally:
        if psutil.pid_exists(started.process.pid):
            for left in psutil.Process(started.process.pid).children(recursive=True):
                left.kill()
        started.process.kill()
        started.process.wait()
        started.reader.join()
        assert started.process.stdout is not None
        started.process.stdout.close()


def alone(number: int) -> Callable[[subprocess.Popen[str]], None]:
    return lambda process: process.send_signal(number)


def group(number: int) -> Callable[[subprocess.Popen[str]], None]:
    """As a terminal does."""
    return lambda process: os.killpg(process.pid, number)


ENDS = {
    "TERM": alone(signal.SIGTERM),
    "KILL": alone(signal.SIGKILL),
    "Ctrl-C": group(signal.SIGINT),
    "hang-up": group(signal.SIGHUP),
}


def ends_in_order(root: Path, command: list[str], end: Callable[[subprocess.Popen[str]], None]) -> None:
    with running(root, command) as started:
        below = started.trains()
        assert any("pipelines.stages.pretrain" in process.cmdline() for process in below)
        end(started.process)
        started.process.wait(120)
        wait_until(lambda: not any(alive(process) for process in below), 120)
        assert started.saved_step() >= 1
        assert started.process.returncode != 0


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def fresh(origin: Path, into: Path) -> Path:
    return Path(shutil.copytree(origin, into / "copy", symlinks=True))


@pytest.mark.acceptance  # by default test_runner.py kills who started a stage, test_resumable.py waits for a trainer
def test_after_kill_9_of_dvc_the_next_repro_waits_for_its_trainer_and_goes_on(table_only: Path, tmp_path: Path) -> None:
    root = fresh(table_only, tmp_path)
    with running(root, DVC) as first:
        below = first.trains()
        first.process.kill()
        first.process.wait()
        with running(root, DVC) as second:
            second.trains()
            assert not any(alive(process) for process in below)
            assert second.has_said(rf"resuming after step {first.saved_step():,}\b")
            second.process.terminate()
            wait_until(lambda: second.has_said("its state is saved, run the same command again"), 60)


@pytest.mark.acceptance
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_dvc(end: Callable[[subprocess.Popen[str]], None], table_only: Path, tmp_path: Path) -> None:
    ends_in_order(fresh(table_only, tmp_path), DVC, end)


@pytest.mark.acceptance
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_make(end: Callable[[subprocess.Popen[str]], None], prepared: Path, tmp_path: Path) -> None:
    ends_in_order(fresh(prepared, tmp_path), MAKE, end)


@pytest.mark.acceptance
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_flow(end: Callable[[subprocess.Popen[str]], None], prepared: Path, tmp_path: Path) -> None:
    ends_in_order(fresh(prepared, tmp_path), FLOW, end)


@pytest.mark.acceptance
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_torchrun(end: Callable[[subprocess.Popen[str]], None], table_only: Path, tmp_path: Path) -> None:
    """Its ranks live in sessions of their own."""
    ends_in_order(fresh(table_only, tmp_path), [*TORCHRUN, "-m", "pipelines.stages.pretrain"], end)


@pytest.mark.acceptance
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_dvc_whose_stage_starts_several_processes(
    end: Callable[[subprocess.Popen[str]], None], table_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEVERAL, "DINO_PROCESSES", "2")
    ends_in_order(fresh(table_only, tmp_path), DVC, end)
