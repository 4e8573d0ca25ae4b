"""Resumable training state outside DVC: `.work/pretrain/KEY/`, one trainer at a time, the last two saves kept.

DVC deletes outs before it runs a stage, so what a training resumes from cannot be an out. The KEY names the intent:
a changed setting never resumes a stale run, and a setting that comes back resumes its own.
"""

import fcntl
import sys
from pathlib import Path
from typing import Any, TextIO

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
    """The saved states of one KEY.

    Raises:
        ValueError: Another process trains the same KEY.
    """

    def __init__(self, key: str, environment: dict[str, Any]) -> None:
        self.folder = paths.work_dir() / "pretrain" / key
        self.environment = environment
        self.bit_exact = True
        self.newest, self.previous = self.folder / "state.safetensors", self.folder / "previous.safetensors"
        self._lock = self._locked()

    def _locked(self) -> TextIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains this very setting (its state lies in {self.folder}); wait for it or stop it"
            ) from None
        return lock

    def load(self) -> TrainingState | None:
        """The newest state that verifies, or None."""
        for path in (self.newest, self.previous):
            if not path.is_file():
                continue
            try:
                state, facts = load_state(path)
            except ValueError as problem:
                print(f"pretrain: {problem}; trying the save before", file=sys.stderr)
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
            print(
                f"pretrain: resuming in another environment ({'; '.join(changed)}): the result is as good, but not "
                "identical to the bit to an uninterrupted run; recorded as bit_exact: false",
                file=sys.stderr,
            )

    def save(self, state: TrainingState) -> None:
        """Keep this state, and the one before it until the next save."""
        aside: Path = self.folder / "next.safetensors"
        save_state(aside, state, {"environment": self.environment, "bit_exact": self.bit_exact})
        if self.newest.is_file():
            self.newest.replace(self.previous)
        aside.replace(self.newest)
