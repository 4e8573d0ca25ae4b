"""Resumable training state outside DVC: `.work/pretrain/KEY/`, one trainer at a time, the last two saves kept.

DVC deletes outs before it runs a stage, so what a training resumes from cannot be an out. The KEY names the intent:
a changed setting never resumes a stale run, and a setting that comes back resumes its own.
"""

import fcntl
import sys
from pathlib import Path
from typing import Any, Self, TextIO

import torch

from dino.training_state import TrainingState, load_state, save_state
from pipelines import paths


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """What repeats bytes besides the intent: the same environment gives the same bits."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


class Resumable:
    """The saved states of one KEY; leaving the block, or the process's end, frees the KEY for others.

    Args:
        key: Names the folder.
        environment: This process's, see `environment`.
        writes: Whether this process locks, writes and speaks: of several ranks the main one.

    Raises:
        ValueError: Another process trains the same KEY.
    """

    def __init__(self, key: str, environment: dict[str, Any], *, writes: bool = True) -> None:
        self.folder = paths.work_dir() / "pretrain" / key
        self.environment = environment
        self.writes = writes
        self.bit_exact = True
        self.newest, self.previous = self.folder / "state.safetensors", self.folder / "previous.safetensors"
        self._lock = self._locked() if writes else None

    def _locked(self) -> TextIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"another process trains this very setting (its state lies in {self.folder}); wait for it or stop it"
            ) from None
        for half_written in self.folder.glob(".*.part.safetensors"):  # by a process that was killed
            half_written.unlink()
        return lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
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
            except ValueError as problem:
                self._say(f"{problem}; going back to the save before, or to the start")
                if self.writes:  # aside: the next save must not push the good one out
                    path.replace(self.folder / "damaged.safetensors")
                continue
            self._compare(facts)
            return state
        return None

    def _compare(self, facts: dict[str, Any]) -> None:
        before = facts["environment"]
        changed = [
            f"{name} {before.get(name)} -> {now}" for name, now in self.environment.items() if before.get(name) != now
        ]
        self.bit_exact = facts["bit_exact"] and not changed
        if changed:
            self._say(
                f"resuming in another environment ({'; '.join(changed)}): the result is as good, but not identical to "
                "the bit to an uninterrupted run; recorded as bit_exact: false"
            )

    def save(self, state: TrainingState) -> None:
        """Keep this state, and the one before it until the next save."""
        if not self.writes:
            return
        aside: Path = self.folder / "next.safetensors"
        save_state(aside, state, {"environment": self.environment, "bit_exact": self.bit_exact})
        if self.newest.is_file():
            self.newest.replace(self.previous)
        aside.replace(self.newest)
