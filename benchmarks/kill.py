"""`python -m benchmarks.kill --kills 20 --seed 0`: does a training killed again and again end in the same bytes?

Two scratch copies of this repository train the same tiny ViT on scikit-learn's digits by `dvc repro`. One is left
alone. In the other the whole process group gets kill -9 at seeded moments: in start-up, in a step, inside a checkpoint
write, and after the last step; then `dvc repro` again. Where a kill landed is read from what it left: a half-written
file, the lines printed before, the step of the saved state.

Prints each kill and a summary, as JSON at the end. Exit code 0 when all outs of the training and the choice of the
teacher are the same bytes, every restart after the first save went on from it, at least half of those in mid-epoch, no
more steps were redone than lie between two saves, and each kind of moment was hit; else 1.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipelines import params, paths
from pipelines.processes.scratch import copy_repository
from pipelines.rows.workspace import Lock

BATCH, SAVE_STEPS = 64, 5
START_UP, STEP, WRITE, END = "start-up", "step", "checkpoint write", "after the last step"
PHASES = (START_UP, STEP, WRITE, END)
TARGET = "select"  # the stage that writes models/teacher.safetensors
OUTS_OF = ("pretrain", TARGET)
PATIENCE_SECONDS = 600.0
KEY_LINE = re.compile(r"pretrain: .* ([\d,]+) steps of \d+ .*, key (\w+)(?:; resuming after step ([\d,]+))?")
PROGRESS_LINE = re.compile(r"pretrain: ([\d,]+) of [\d,]+ images")


def settings(epochs: int, save_steps: int | None) -> dict[str, dict[str, Any]]:
    """A network of many prototypes: quick steps, but a state of 10 MB, whose writing takes a moment to hit."""
    return {
        "data": {"folder": "data/raw/digits"},
        "pretrain": {
            "epochs": epochs,
            "batch": BATCH,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "out_dim": 8192,
            "hidden_dim": 32,
            "bottleneck_dim": 64,
            "global_px": 8,
            "local_px": 4,
            "drop_path_rate": 0.1,
            "warmup_epochs": 0.5,
            "blur_p": [0.5, 0.5, 0.5],
            "solarize_p": [0.0, 0.2, 0.0],
        },
        "embed": {"resize_px": 8, "crop_px": 8, "pixels_px": 8},
        "runtime": {
            "tracking": {"enabled": False},
            "pretrain": {"save_minutes": None if save_steps else 60.0, "save_steps": save_steps},
        },
    }


def number(text: str) -> int:
    """1,234 as a number."""
    return int(text.replace(",", ""))


class Run:
    """One `dvc repro` in a process group of its own, and what it has said so far."""

    def __init__(self, folder: Path, target: str = TARGET) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DINO_", "DVC_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dvc", "repro", target],
            cwd=folder,
            env=environment
            | {"PATH": path, "PYTHONUNBUFFERED": "1", "DINO_PROGRESS_SECONDS": "0", "DO_NOT_TRACK": "true"}
            | {"DINO_DEVICE": os.environ.get("DINO_DEVICE", "cpu")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stdout.readline, ""))

    def found(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The last line that fits."""
        return next(filter(None, map(pattern.match, reversed(self.lines[:]))), None)

    @property
    def began(self) -> bool:
        """Whether the trainer has said what it trains."""
        return self.found(KEY_LINE) is not None

    @property
    def resumed_at(self) -> int:
        """The step that it went on from."""
        match = self.found(KEY_LINE)
        return number(match[3]) if match and match[3] else 0

    @property
    def last_step(self) -> int:
        """The last step that it reported."""
        match = self.found(PROGRESS_LINE)
        return self.resumed_at + (number(match[1]) // BATCH if match else 0)

    def wait_until(self, true: Callable[[], bool], pause_seconds: float = 0.002) -> bool:
        """Return when it is true, or when the run has ended: then False."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"not within {PATIENCE_SECONDS:.0f} s; its last lines: {self.lines[-5:]}")
            time.sleep(pause_seconds)
        return True

    def kill(self) -> None:
        """Kill -9 of the whole group; returns when it has ended and all that it said is read."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.end()

    def end(self) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@dataclass
class Victim:
    """The copy whose runs are killed."""

    folder: Path
    total_steps: int
    kills: list[dict[str, Any]] = field(default_factory=list)

    @property
    def states(self) -> Path:
        """Where trainings keep what they resume from."""
        return self.folder / ".work/pretrain"

    def half_written(self) -> list[Path]:
        """Files of a checkpoint that is being written: aside, or not yet renamed."""
        return [*self.states.rglob(".*.part.safetensors"), *self.states.rglob("next.safetensors")]

    def saved_step(self) -> int:
        """Step of the newest whole state; 0 if there is none."""
        steps = [0]
        for path in [*self.states.glob("*/state.safetensors"), *self.states.glob("*/previous.safetensors")]:
            try:
                with safe_open(path, framework="numpy") as file:
                    steps.append(json.loads(file.metadata()["dino"])["step"])
            except (SafetensorError, OSError):  # just being renamed
                continue
        return max(steps)

    def landed(self, run: Run) -> str:
        """Where a kill landed, by what it left."""
        if not run.began:
            return START_UP
        if self.half_written():
            return WRITE
        return END if self.saved_step() == self.total_steps else STEP

    def wait_for(self, phase: str, run: Run, rng: random.Random) -> bool:
        """Return at a moment of this kind; False if the run ended before."""
        if phase == START_UP:
            here = run.wait_until(lambda: any("Running stage 'pretrain'" in line for line in run.lines))
            moment = time.monotonic() + rng.uniform(0, 1.5)
            return here and run.wait_until(lambda: time.monotonic() > moment or run.began)
        if phase == END:
            here = run.wait_until(lambda: run.began and self.saved_step() == self.total_steps, 0.02)
            time.sleep(rng.uniform(0, 0.5))
            return here
        steps = rng.randint(1, 2 * SAVE_STEPS)
        here = run.wait_until(lambda: run.last_step >= run.resumed_at + steps)
        if phase == WRITE:  # a busy wait: it lasts some 50 ms
            return here and run.wait_until(lambda: bool(self.half_written()), 0.0005)
        time.sleep(rng.uniform(0, 0.05))
        return here


def plan(kills: int, rng: random.Random) -> list[str]:
    """Kinds of moments in the order they shall be tried; those after the last step can only come last."""
    end = max(1, kills // 7)
    start_up = max(1, kills // 5) if kills >= len(PHASES) else 0
    write = max(1, kills // 4)
    phases = [START_UP] * start_up + [WRITE] * write + [STEP] * max(1, kills - end - start_up - write)
    rng.shuffle(phases)
    return phases[: kills - end] + [END] * end


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train once in quiet and once with kills; what was found."""
    rng = random.Random(seed)
    quiet, killed = folder / "quiet", folder / "killed"
    epochs = 3 + kills  # a run that is killed gets on by less than an epoch
    copy_repository(quiet, settings(epochs, save_steps=None))
    must(Run(quiet, "prepare"))
    shutil.copytree(quiet, killed, symlinks=True)
    params.rewrite(killed / paths.PARAMS, settings(epochs, SAVE_STEPS))
    began = time.monotonic()
    total_steps = must(Run(quiet))
    print(f"quiet run: {total_steps:,} steps in {time.monotonic() - began:.0f} s, with DVC", flush=True)
    victim = Victim(killed, total_steps)
    steps_per_epoch = total_steps // epochs
    began = time.monotonic()
    saved_before = 0
    redone: list[int] = []
    resumed: list[int] = []
    trained_to: int | None = None  # by the run before, where it had begun

    def went_on(run: Run) -> None:
        nonlocal trained_to
        if run.began:
            if trained_to is not None:
                redone.append(trained_to - run.resumed_at)
            if saved_before:
                resumed.append(run.resumed_at)
            trained_to = run.last_step

    for wanted in plan(kills, rng):
        run = Run(victim.folder)
        if not victim.wait_for(wanted, run, rng):
            raise RuntimeError(f"the run ended before the kill ({wanted}): {run.lines[-8:]}")
        run.kill()
        went_on(run)
        saved_before = victim.saved_step()
        victim.kills.append(
            {"wanted": wanted, "landed": victim.landed(run), "step": run.last_step, "saved": saved_before}
        )
        print(
            f"kill {len(victim.kills)}: {victim.kills[-1]['landed']}, step {run.last_step}, saved {saved_before}"
            + (f", resumed at {run.resumed_at}" if run.began else ""),
            flush=True,
        )
    last = Run(victim.folder)
    code = last.end()
    went_on(last)
    if code:
        raise RuntimeError(f"the last run failed: {last.lines[-8:]}")
    lock, expected = Lock(victim.folder / "dvc.lock"), Lock(quiet / "dvc.lock")
    different = [path for path, md5 in expected.outs(*OUTS_OF).items() if lock.outs(*OUTS_OF).get(path) != md5]
    return {
        "kills": kills,
        "seed": seed,
        "landed": dict(Counter(kill["landed"] for kill in victim.kills)),
        "total_steps": total_steps,
        "steps_per_epoch": steps_per_epoch,
        "save_steps": SAVE_STEPS,
        "restarts_after_a_save": len(resumed),
        "resumed_from_0": resumed.count(0),
        "resumed_mid_epoch": sum(step % steps_per_epoch != 0 for step in resumed if step < total_steps),
        "resumed_before_the_end": sum(step < total_steps for step in resumed),
        "steps_redone": sum(redone),
        "most_steps_redone": max(redone, default=0),
        "outs": len(expected.outs(*OUTS_OF)),
        "different": different,
        "seconds": round(time.monotonic() - began),
    }


def must(run: Run) -> int:
    """Wait for a run that must succeed; its total of steps, if it trained."""
    if run.end():
        raise RuntimeError("\n".join(run.lines[-20:]))
    match = run.found(KEY_LINE)
    return number(match[1]) if match else 0


def broken(found: dict[str, Any]) -> list[str]:
    """What does not hold of a measurement."""
    wanted = PHASES if found["kills"] >= len(PHASES) else ()
    laws = {
        f"other bytes: {', '.join(found['different'])}": found["different"],
        "a restart after a save began from the start": found["resumed_from_0"],
        "less than half of the restarts were in mid-epoch": found["resumed_mid_epoch"] * 2
        < found["resumed_before_the_end"],
        "more steps redone than lie between two saves": found["most_steps_redone"] > found["save_steps"],
        **{f"no kill landed in: {phase}": not found["landed"].get(phase) for phase in wanted},
    }
    return [law for law, fails in laws.items() if fails]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in the repository of the current directory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description="Kill a training, compare its bytes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error("--kills: at least 1")
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        found = measure(options.kills, options.seed, Path(folder))
    print(json.dumps(found))
    faults = broken(found)
    for fault in faults:
        print(f"kill: {fault}", file=sys.stderr)
    if not faults:
        print(f"all {found['outs']} outs are the bytes of the quiet run")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
