"""`python -m pipelines.sweep pretrain.lr_at_256=2.5e-4,5.0e-4 pretrain.local_crops=4,8 --jobs 2`: all combinations.

Each is a DVC experiment in a clone of its own that shares data, cache and run-cache, so what lies here stays as it is.
The same command again runs only what is missing, failed ones among it. Ctrl-C saves the trainings, and the same command
goes on. All begin with the state of the repository when the sweep was first started, uncommitted changes included.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines import params, paths
from pipelines.processes import experiment
from pipelines.processes.ending import EXIT_REQUEUE, SIGNALS
from pipelines.processes.experiment import Base, Commands
from pipelines.processes.graph import settings_of_a_clone, stage_graph
from pipelines.processes.lock import hold
from pipelines.processes.progress import BETWEEN_LINES, heard
from pipelines.processes.stage import positive, run_command
from pipelines.recipe import over
from pipelines.rows import origin, row
from pipelines.sweeps import record as sweep_record
from pipelines.sweeps import table as sweep_table
from pipelines.sweeps.record import Record
from pipelines.sweeps.schedule import Schedule
from pipelines.sweeps.screen import Screen
from pipelines.sweeps.variants import Variant, digest, grid, label, look_up, nested, parse

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
ANNOUNCED = re.compile(r"(?:Running stage|Stage) '([^']+)'")  # DVC's words before a stage, run or not


class Sweep:
    """Runs the variants that are missing, so many at once."""

    def __init__(self, record: Record, base: Base, settings: Mapping[str, Any], screen: Screen) -> None:
        self.record, self.base, self.settings, self.screen = record, base, settings, screen
        self.commands = Commands()
        self.git = threading.Lock()  # one at a time

    def run(self, missing: Sequence[Variant], jobs: int) -> None:
        """Run them; returns when nothing of them runs any more."""
        schedule = Schedule(missing, self.settings)
        devices = visible_gpus()

        def work(slot: int) -> None:
            while variant := schedule.take():
                try:
                    self.one(variant, schedule, share(devices, slot, jobs))
                finally:
                    schedule.ended(variant)

        def stop(number: int, frame: FrameType | None) -> None:
            if not schedule.ending:
                self.screen.say(f"{signal.Signals(number).name}: trainings are saved; once more ends them at once")
            self.commands.end(hurry=schedule.ending)
            schedule.ending = True

        before = {n: signal.signal(n, stop) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(min(jobs, len(missing)))]
        try:
            with self.screen:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # a signal is taken between these
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def one(self, variant: Variant, schedule: Schedule, environment: Mapping[str, str]) -> None:
        """Run one variant and record how it went."""
        began, called = time.monotonic(), label(variant.settings)
        self.screen.started(called)
        clone = self.record.folder / "clones" / variant.name
        try:
            reason, commit = self.experiment(variant, schedule, clone, environment)
        except (OSError, ValueError) as error:
            reason, commit = str(error), ""
        finally:
            experiment.remove_clone(clone)
        if schedule.ending and not commit:
            self.record.note(variant.name, "interrupted")
            self.screen.ended(called, "saved, the same command goes on with it")
            return
        state = "done" if commit else "failed"
        self.record.note(variant.name, state, reason=reason, seconds=round(time.monotonic() - began, 1), commit=commit)
        told = "" if commit else f"{failure(reason)}; all it said: {os.path.relpath(self.record.log(variant.name))}"
        self.screen.ended(called, told, ok=bool(commit))

    def experiment(
        self, variant: Variant, schedule: Schedule, clone: Path, environment: Mapping[str, str]
    ) -> tuple[str, str]:
        """Run one in its clone; why it failed, or the commit that holds it."""
        called = label(variant.settings)
        needed = [str(look_up(schedule.settings[variant.name], name)) for name in origin.OUTSIDE]
        with self.git:
            experiment.make_clone(self.base, clone, needed)
        env = {
            "DINO_ROOT": str(paths.real_root()),
            "DINO_SWEEP": self.record.name,
            BETWEEN_LINES: os.environ.get(BETWEEN_LINES, "2" if self.screen.live else "15"),
            **environment,
        }
        with self.record.log(variant.name).open("w", encoding="utf-8") as log:

            def take(line: str) -> None:
                print(line, file=log, flush=True)
                if found := ANNOUNCED.match(line):
                    schedule.begins(variant, found[1])
                    self.screen.at(called, found[1])
                elif heard(line):
                    self.screen.at(called, line)

            command = ["-P", "-m", "dvc", "exp", "run", "--name", variant.name, *variant.overrides()]
            code, lines = self.commands.run(command, clone, env, take)
            if code:
                return reason_of(lines), ""
            commit = origin.git("rev-parse", self.base.reference(variant.name), at=clone)
            if commit is None:
                return "DVC made no experiment of it", ""
            commit_name = commit.decode().strip()
            if self.settings["runtime"]["tracking"]["enabled"]:
                self.screen.at(called, "MLflow")
                env |= {
                    "DVC_EXP_NAME": variant.name,
                    "DVC_EXP_BASELINE_REV": self.base.commit,
                    "DINO_EXP_REV": commit_name,
                }
                code, lines = self.commands.run(["-m", "pipelines.sync"], clone, env, take)
                if code and not schedule.ending:
                    why = (lines or ["without a word"])[-1].removeprefix("sync: ")
                    self.screen.say(f"{called}: its MLflow row is not up to date ({why}); no result is lost")
        if schedule.ending and code:
            return "", ""
        with self.git:
            experiment.bring_home(self.base, clone, variant.name)
        return "", commit_name


def failure(reason: str) -> str:
    """A reason that says that something failed."""
    return reason if " failed" in reason else f"failed: {reason}"


def reason_of(lines: Sequence[str]) -> str:
    """Why an experiment failed, from its last lines: a stage's own words, else DVC's, else the last."""
    starts = [number for number, line in enumerate(lines) if re.match(r"\w+ failed: ", line)]
    if starts:
        said = lines[starts[-1] :]
        end = next((n for n, line in enumerate(said) if line.startswith(("(set ", "ERROR: "))), len(said))
        return " ".join(line.strip() for line in said[:end])
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["without a word"])[-1]


def visible_gpus() -> list[str]:
    """Names of the GPUs that a stage would use; none without a driver."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    with suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        return [str(number) for number, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
    return []


def share(devices: Sequence[str], slot: int, jobs: int) -> dict[str, str]:
    """The environment of one of several at once: every jobs-th GPU; where there are fewer, one that others use too."""
    if jobs == 1 or not devices:
        return {}
    own = devices[slot::jobs] or [devices[slot % len(devices)]]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def base_here() -> Base:
    """The state of the repository as it lies here.

    Raises:
        ValueError: No git repository with a commit, or no DVC in it.
    """
    commit = origin.words("rev-parse", "--verify", "HEAD")
    if not commit or Path(origin.words("rev-parse", "--show-toplevel")).resolve() != Path.cwd().resolve():
        raise ValueError(f"{Path.cwd()} is not the root of a git repository with a commit: go there and repeat")
    stage_graph()
    return Base(commit, origin.uncommitted(), settings_of_a_clone())


def missing_of(variants: Sequence[Variant], record: Record, base: Base, current: Mapping[str, Any]) -> list[Variant]:
    """Those without an experiment on this commit.

    Raises:
        ValueError: An experiment of that name has other settings.
    """
    done = base.done()
    for variant in variants:
        if variant.name in done and record.commit(variant.name) != done[variant.name]:
            there = params.value((origin.git("show", f"{done[variant.name]}:{paths.PARAMS}") or b"").decode())
            wanted = over(dict(current), nested(variant.settings))
            if results_of(there) != results_of(wanted):
                raise ValueError(
                    f"an experiment {variant.name} stands on this commit with other settings; choose another --name"
                )
            record.note(variant.name, "done", commit=done[variant.name])
    return [variant for variant in variants if variant.name not in done]


def results_of(settings: Any) -> dict[str, Any]:
    """The settings that change results, as stages see them; as they are if an older version wrote them."""
    with suppress(ValueError):
        settings = row.plain(params.check(settings, paths.PARAMS))
    return {name: value for name, value in (settings or {}).items() if name != "runtime"}


def start(options: argparse.Namespace, console: Console) -> int:
    """Run what is missing, then the table; the exit code."""
    values = parse(options.settings, options.seeds)
    current = params.read(paths.PARAMS)
    checked = row.plain(params.check(current, paths.PARAMS))
    base = base_here()
    name = options.name or f"sweep-{digest([base.commit, base.patch.hex(), sorted(values)])[:4]}"
    if not NAME.fullmatch(name):
        raise ValueError(f"--name {name!r}: letters, digits, and . _ - between them make a name")
    variants = grid(values, current, name)
    record = sweep_record.of(name, base, variants)
    if not options.table:
        missing = missing_of(variants, record, base, checked)
        done = len(variants) - len(missing)
        console.print(Text(f"Sweep {name}: {len(variants)} experiments, {done} done, {len(missing)} to run"))
        if strangers := origin.untracked():
            told = f"{', '.join(strangers[:5])}{' ...' if len(strangers) > 5 else ''}"
            console.print(Text(f"Not known to git, so not part of it: {told}"), soft_wrap=True)
        if options.dry:
            for variant in variants:
                console.print(Text(f"  {variant.name}  {'to run' if variant in missing else 'done'}"), soft_wrap=True)
            return 0
        with hold(record.folder / "lock", f"runs the sweep {name}"):
            record.keep()
            experiment.remove_clone(record.folder / "clones")  # of one that was killed
            sweep = Sweep(record, base, checked, Screen(console, len(missing), min(options.jobs, len(variants))))
            sweep.run(missing, options.jobs)
    return finish(record, options, console, [variant.name for variant in variants])


def finish(record: Record, options: argparse.Namespace, console: Console, names: Sequence[str] | None = None) -> int:
    """Print the table, write the CSV; the exit code."""
    score = options.score or row.plain(params.load())["runtime"]["promote"]["score"]
    table = sweep_table.read(record, names, score)
    sweep_table.show(table, console)
    if options.out:
        sweep_table.write(table, options.out)
        console.print(Text(f"Written to {options.out}"))
    if options.table:
        return 0
    if {"interrupted", "missing"} & table.states:
        console.print(Text("Not finished; the same command goes on."))
        return EXIT_REQUEUE
    return 1 if "failed" in table.states else 0


def seeds(text: str) -> list[int]:
    """0,1,2"""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.sweep", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("settings", nargs="*", metavar="SECTION.NAME=VALUE,VALUE", help="values to try; lists in [ ]")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="so many at once, sharing the GPUs")
    parser.add_argument("--seeds", type=seeds, default=[], metavar="0,1,2", help="each with these, then mean and std")
    parser.add_argument("--name", help="of the sweep; default: one for these settings and the state it begins with")
    parser.add_argument("--score", choices=sweep_table.STAGES, help="decides, on val (default: runtime.promote.score)")
    parser.add_argument(
        "--table", action="store_true", help="run nothing, show the table (the last sweep's, or --name)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the table, all columns, as CSV too")
    parser.add_argument("--dry", action="store_true", help="check everything and list the experiments only")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "180")))

    def work() -> None:
        if options.table and not options.settings and not options.seeds:
            sys.exit(finish(sweep_record.find(options.name), options, console))
        if not options.settings and not options.seeds:
            parser.error("name settings to try, such as pretrain.local_crops=4,8, or --seeds, or --table")
        sys.exit(start(options, console))

    run_command("sweep", work)


if __name__ == "__main__":
    main()
