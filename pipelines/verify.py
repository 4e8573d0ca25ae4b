"""`python -m pipelines.verify [STAGE...]`: run stages anew in a scratch copy, and compare every out with dvc.lock.

The copy holds the working tree as it stands, with a DVC store, a `.work/` and a git of its own; nothing is restored
from a cache, tracking is off, and nothing here is changed. It is removed at the end.

Exit code: 0 when every out is identical, 1 when one differs or there is nothing to compare, 75 when interrupted.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines import paths
from pipelines.differences import difference
from pipelines.processes import ending
from pipelines.processes.graph import stage_graph, stages_for
from pipelines.processes.runner import Outcome, StageRunner
from pipelines.processes.scratch import copy_repository
from pipelines.processes.seconds import read_seconds
from pipelines.rows.workspace import Lock

QUIET = {"runtime": {"tracking": {"enabled": False}}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in the repository of the current directory."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.verify", description="Run stages anew and compare")
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help="only these, on what they need as it is; default: all"
    )
    parser.add_argument("--keep", action="store_true", help="leave the scratch copy, to look at it")
    options = parser.parse_args(arguments)
    try:
        return verify(options.stages, options.keep)
    except (ValueError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1


def verify(targets: Sequence[str], keep: bool = False) -> int:
    """Run the stages in a scratch copy, say what was executed and what differs; 0 when all is identical.

    Raises:
        ValueError: an unknown stage, one that never ran, or one whose outs or needs are not what dvc.lock holds.
    """
    graph = stage_graph()
    stages_for(graph, targets)  # refuses unknown ones
    stages = [stage for stage in graph if stage in targets or not targets]
    lock = Lock()
    refuse_never_run(lock, stages)
    refuse_changed(stages)
    known = read_seconds()
    if all(stage in known for stage in stages):
        print(f"verify: {_count(stages)}, {sum(known[stage] for stage in stages):,.0f} s the last time")
    with scratch_folder(keep) as scratch:
        copy_repository(scratch, QUIET)
        bring(lock, stages, scratch)
        if not execute(stages, scratch):
            return 1
        return compare(lock, Lock(scratch / "dvc.lock"), stages, scratch)


def refuse_never_run(lock: Lock, stages: Sequence[str]) -> None:
    """Raises ValueError: dvc.lock holds nothing of a stage."""
    if never := [stage for stage in stages if stage not in lock.stages]:
        raise ValueError(f"dvc.lock holds no result of {', '.join(never)} to compare with; `dvc repro` makes one")


def refuse_changed(stages: Sequence[str]) -> None:
    """Raises ValueError: what a stage reads or leaves is not what dvc.lock holds, so a difference would say nothing."""
    command = [sys.executable, "-P", "-m", "dvc", "status", "--json", *stages]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(f"`dvc status` failed: {asked.stderr.strip()}")
    changed = [
        f"  {stage}: {path} is {what if isinstance(what, str) else 'changed'}"
        for stage, entries in json.loads(asked.stdout).items()
        for entry in entries
        if isinstance(entry, dict)
        for kind in entry.values()
        for path, what in (kind.items() if isinstance(kind, dict) else [(kind, "changed")])
    ]
    if changed:
        listed = "\n".join(changed)
        raise ValueError(
            f"not what dvc.lock holds:\n{listed}\n"
            "`dvc repro` brings results up to date, `dvc checkout` brings files back"
        )


@contextlib.contextmanager
def scratch_folder(keep: bool) -> Iterator[Path]:
    """A folder on the disk of `.work/`, removed at the end unless it is to be kept."""
    home = paths.work_dir() / "verify"
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=home))
    try:
        yield folder
    finally:
        if keep:
            print(f"verify: the scratch copy stays in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another one runs
                home.rmdir()


def bring(lock: Lock, stages: Sequence[str], scratch: Path) -> None:
    """Link what the stages need and none of them makes: outs of other stages, a folder of images."""
    made = {Path(path) for path in lock.outs(*stages)}
    for path in sorted({path for stage in stages for path in lock.deps(stage)}):
        inside = scratch / path
        if not inside.exists() and not any(out == Path(path) or out in Path(path).parents for out in made):
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(Path(path).resolve())


def execute(stages: Sequence[str], scratch: Path) -> bool:
    """Run each stage in the scratch copy, showing its words; whether all were executed, none restored or skipped."""
    with contextlib.chdir(scratch), StageRunner(force=True, env={"DINO_ROOT": str(scratch)}) as runner:
        for number, stage in enumerate(stages, 1):
            print(f"verify: {stage} ({number} of {len(stages)})", flush=True)
            result = runner.run(stage, lambda line: print(f"  {line}", flush=True))
            if result.outcome is not Outcome.RAN:
                print(f"verify: {stage} was not executed but {result.outcome}", file=sys.stderr)
                return False
            print(f"verify: {stage} executed in {result.seconds:.1f} s", flush=True)
    return True


def compare(before: Lock, now: Lock, stages: Sequence[str], scratch: Path) -> int:
    """Say of each out whether it is what dvc.lock holds; 0 when all are."""
    different = 0
    for stage in stages:
        new, old = now.outs(stage), before.outs(stage)
        for path in sorted({*old, *new}, key=[*old, *new].index):
            if old.get(path) == new.get(path):
                continue
            different += 1
            why = difference(Path(path), scratch / path) if os.path.lexists(path) else "not there before"
            print(f"verify: {stage}: {path} differs: {why or 'by its md5 only'}")
    total = len(now.outs(*stages))
    if different:
        print(f"verify: {_count(stages)} executed, {different} of {total} outs differ from dvc.lock")
        return 1
    print(f"verify: {_count(stages)} executed, all {total} outs are identical to dvc.lock")
    return 0


def _count(stages: Sequence[str]) -> str:
    return f"{len(stages)} stage{'s' * (len(stages) > 1)}"


if __name__ == "__main__":
    ending.heed(ending.leave)
    ending.watch_parent()
    sys.exit(main())
