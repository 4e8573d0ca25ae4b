"""Resumable training state outside DVC: `.work/pretrain/KEY/`, one trainer at a time, the last two saves kept.

DVC deletes outs before it runs a stage, so what a training resumes from cannot be an out. The KEY names the intent:
a changed setting never resumes a stale run, and a setting that comes back resumes its own.
"""

import math
import os
import platform
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

from dino.files import flush_folder
from dino.training_state import TrainingState, load_state, save_state
from pipelines import paths
from pipelines.processes.lock import hold

LOCK, NEXT, NEWEST, PREVIOUS = "lock", "next.safetensors", "state.safetensors", "previous.safetensors"


def states_folder() -> Path:
    """Where the folder of each KEY lies."""
    return paths.work_dir() / "pretrain"


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """What repeats bytes besides the intent: the same environment gives the same bits."""
    return {
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": metadata.version("numpy"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def _cpu() -> str:
    """The processor's name: libraries choose kernels by it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class Resumable:
    """The saved states of one KEY; a block in which no other process trains it.

    Args:
        key: Names the folder.
        environment: This process's, see `environment`.
        about: More facts to save with each state, for people: `python -m pipelines.states` shows them.
        writes: Whether this process locks, writes and speaks: of several ranks the main one.
        wait_minutes: How long to wait where another process trains the same KEY.

    Raises:
        ValueError: Entered while another process trains the same KEY, after that time too.
    """

    def __init__(
        self,
        key: str,
        environment: dict[str, Any],
        *,
        about: dict[str, Any] | None = None,
        writes: bool = True,
        wait_minutes: float = 0.0,
    ) -> None:
        self.folder = states_folder() / key
        self.environment = environment
        self.about = about or {}
        self.writes = writes
        self.wait_minutes = wait_minutes
        self.bit_exact = True
        self.saved_at = -math.inf  # when the last save ended, by time.monotonic
        self.newest, self.previous = self.folder / NEWEST, self.folder / PREVIOUS
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        if self.writes:
            does = f"trains this very setting (its state lies in {self.folder})"
            self._lock.enter_context(hold(self.folder / LOCK, does, self.wait_minutes))
            for unfinished in (*self.folder.rglob(".*.part.safetensors"), self.folder / NEXT):  # by a killed process
                unfinished.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _say(self, text: str) -> None:
        if self.writes:
            print(f"pretrain: {text}", file=sys.stderr)

    def load(self) -> TrainingState | None:
        """The newest state that verifies, or None."""
        for path in (self.newest, self.previous):
            if not path.is_file():
                continue
            try:
                state, facts = load_state(path)
                before, bit_exact = facts["environment"], facts["bit_exact"]
            except (ValueError, KeyError) as problem:
                self._say(f"{problem}; going back to the save before, or to the start")
                if self.writes:  # aside: the next save must not push the good one out
                    path.replace(self.folder / "damaged.safetensors")
                continue
            self._compare(before, bit_exact)
            return state
        return None

    def _compare(self, before: dict[str, Any], bit_exact: bool) -> None:
        changed = [
            f"{name} {before.get(name)} -> {now}" for name, now in self.environment.items() if before.get(name) != now
        ]
        self.bit_exact = bit_exact and not changed
        if changed:
            self._say(
                f"resuming in another environment ({'; '.join(changed)}): the result is as good, but not identical to "
                "the bit to an uninterrupted run; recorded as bit_exact: false"
            )

    def save(self, state: TrainingState) -> None:
        """Keep this state, once it reads back well, and the one before it until the next save.

        Raises:
            OSError: What was written does not read back; the saves before it stay.
        """
        if not self.writes:
            return
        aside = self.folder / NEXT
        save_state(aside, state, {"environment": self.environment, "bit_exact": self.bit_exact, "about": self.about})
        forget_cached(aside)
        try:
            load_state(aside)
        except ValueError as problem:
            raise OSError(
                f"the state just written reads back damaged ({problem}); the one before is kept. The disk or the "
                "memory of this machine may be failing: go on with the same command on another one"
            ) from problem
        if self.newest.is_file():
            self.newest.replace(self.previous)
        aside.replace(self.newest)
        flush_folder(self.folder)
        self.saved_at = time.monotonic()


def forget_cached(path: Path) -> None:
    """Drop a written file from memory where the system lets us (Linux), so that reading it asks the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
