"""`python -m pipelines.states [--drop KEY... | --drop-unused] [--yes]`: what lies in `.work/pretrain/`, and its end.

Nothing is ever dropped by itself. In use, and never dropped, is the training of a KEY that a process runs now, and the
unfinished one that params.yaml and the prepared images here would resume. `--drop-unused` also spares what
models/teacher.safetensors and dvc.lock come from.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from safetensors import SafetensorError, safe_open

from pipelines import paths
from pipelines.params import load
from pipelines.processes.lock import hold, holder
from pipelines.rows import row, workspace
from pipelines.training.intent import key_here
from pipelines.training.resumable import LOCK, NEWEST, PREVIOUS, states_folder


@dataclass(frozen=True)
class State:
    """One KEY's folder.

    Attributes:
        key: Its name.
        folder: Where it lies.
        size_bytes: Of all its files.
        saved: Seconds since the epoch, of the last save; of the folder where there is none.
        facts: What the newest readable state says of itself; empty where none can be read.
        holder: The process that trains it now, or None.
    """

    key: str
    folder: Path
    size_bytes: int
    saved: float
    facts: dict[str, Any]
    holder: str | None

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.facts.get("step", 0))

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole training, where the state says so."""
        return self.facts.get("about", {}).get("total_steps")

    @property
    def finished(self) -> bool:
        """Whether it has all its steps."""
        return self.step > 0 and self.step == self.total_steps


def states() -> list[State]:
    """Every KEY's state, the last saved first."""
    folder = states_folder()
    found = [_state(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda state: -state.saved)


def _state(folder: Path) -> State:
    files = [file for file in folder.rglob("*") if file.is_file()]
    saves = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).is_file()]
    return State(
        key=folder.name,
        folder=folder,
        size_bytes=sum(file.stat().st_size for file in files),
        saved=max((file.stat().st_mtime for file in saves), default=folder.stat().st_mtime),
        facts=next(filter(None, map(_facts, saves)), {}),
        holder=holder(folder / LOCK),
    )


def _facts(path: Path) -> dict[str, Any]:
    """The facts in a state's header; {} if it can't be read. The tensors are not looked at: they may be many GB."""
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads((file.metadata() or {})["dino"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return {}


def current_key() -> str | None:
    """The KEY that params.yaml and the prepared images would train or resume now; None where they name none."""
    with suppress(ValueError, OSError):
        return key_here(load().pretrain)
    return None


def kept_keys() -> dict[str, str]:
    """{KEY: where its results are}: the files here."""
    found: dict[str, str] = {}
    with suppress(ValueError, OSError):
        found[workspace.teacher_metadata()["key"]] = str(paths.TEACHER)
    with suppress(ValueError, OSError):
        if key := workspace.read_json(paths.PRETRAIN_METRICS).get("key"):
            found.setdefault(key, str(paths.PRETRAIN_METRICS))
    return found


def in_use(state: State, here: str | None) -> str | None:
    """Why a state must not be dropped, or None."""
    if state.holder:
        return f"{state.holder} trains it"
    if state.key == here and not state.finished:
        return "params.yaml would resume it"
    return None


def describe(state: State, here: str | None, kept: dict[str, str]) -> str:
    """What refers to a state, in words."""
    words = [in_use(state, here) or ("finished" if state.finished else "")]
    words += ["params.yaml as it stands"] if state.key == here and state.finished else []
    words += [f"its result is {kept[state.key]}"] if state.key in kept else []
    return ", ".join(filter(None, words)) or "unused"


def show(found: Sequence[State], here: str | None, kept: dict[str, str]) -> None:
    """The list, as a table."""
    table = Table(box=None, pad_edge=False)
    for name, side in (("key", "left"), ("steps", "right"), ("size", "right"), ("saved", "right")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("training")
    table.add_column("")
    for state in found:
        of = f" of {state.total_steps:,}" if state.total_steps else ""
        settings = state.facts.get("about", {}).get("params")
        table.add_row(
            state.key,
            f"{state.step:,}{of}" if state.facts else "unreadable",
            decimal(state.size_bytes),
            f"{age(time.time() - state.saved)} ago",
            row.run_name(settings) if settings else "",
            describe(state, here, kept),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{len(found)} in {states_folder()}, {decimal(sum(state.size_bytes for state in found))}")


def age(seconds: float) -> str:
    """A duration in its largest unit: 3 days, 1 hour, 12 minutes, 5 seconds."""
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if (count := int(seconds // length)) or length == 1:
            return f"{count} {name}{'s' * (count != 1)}"
    raise AssertionError


def drop(chosen: Sequence[State]) -> None:
    """Remove folders, each under its lock: no training can begin in one meanwhile."""
    for state in chosen:
        with hold(state.folder / LOCK, "trains this very setting"):
            shutil.rmtree(state.folder)
        print(f"dropped {state.key} ({decimal(state.size_bytes)})")


def choose(found: Sequence[State], keys: Sequence[str], here: str | None) -> list[State]:
    """The states of these KEYs, whose beginning suffices.

    Raises:
        ValueError: No such KEY, more than one, or one that is in use.
    """
    chosen = []
    for key in keys:
        fitting = [state for state in found if state.key.startswith(key)]
        if len(fitting) != 1:
            what = "no state has" if not fitting else f"{len(fitting)} states have"
            raise ValueError(f"{what} a key that begins with {key!r}; `python -m pipelines.states` lists them")
        if why := in_use(fitting[0], here):
            raise ValueError(f"{fitting[0].key} is in use ({why}): it is not dropped")
        chosen += fitting
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in the repository of the current directory."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.states", description="Resumable states of trainings")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--drop", nargs="+", metavar="KEY", default=[], help="remove these (the beginning suffices)")
    group.add_argument("--drop-unused", action="store_true", help="remove all that nothing here refers to")
    parser.add_argument("--yes", action="store_true", help="without asking")
    options = parser.parse_args(arguments)
    found, here, kept = states(), current_key(), kept_keys()
    if not (options.drop or options.drop_unused):
        show(found, here, kept)
        return 0
    try:
        if options.drop_unused:
            chosen = [state for state in found if not in_use(state, here) and state.key not in {here, *kept}]
        else:
            chosen = choose(found, options.drop, here)
        if not chosen:
            print("nothing to drop")
            return 0
        show(chosen, here, kept)
        if not options.yes and not agreed(len(chosen)):
            print("nothing was dropped; --yes drops without asking", file=sys.stderr)
            return 1
        drop(chosen)
    except (ValueError, OSError) as error:
        print(f"states: {error}", file=sys.stderr)
        return 1
    return 0


def agreed(count: int) -> bool:
    """Ask on a terminal; no where nobody can answer."""
    if not os.isatty(sys.stdin.fileno()):
        return False
    return input(f"Drop {'these' if count > 1 else 'this'}? [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(main())
