"""Tiny real DVC repositories: a stage is a Python script that needs other stages' files and leaves one of its own."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from pipelines import params

PROJECT = Path(__file__).parents[2]

# Says where it is, and saves when it is told to end; `slow` is how long that takes, in seconds.
TRAIN = """
import os, pathlib, signal, sys, time
def save(number, frame):
    print("saving", flush=True)
    time.sleep({slow})
    pathlib.Path("saved").write_text("whole")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("pid").write_text(str(os.getpid()))
print("training", flush=True)
time.sleep(120)
"""

# Each of the two goes on only when the other has begun: neither ends unless they overlap.
MEET = """
import pathlib, time
pathlib.Path("{me}.here").touch()
until = time.monotonic() + 30
while not pathlib.Path("{other}.here").exists():
    assert time.monotonic() < until, "alone for 30 s"
    time.sleep(0.02)
print("met {other}")
"""


def repository(
    root: Path, stages: dict[str, tuple[Iterable[str], str]], runtime: Mapping[str, Any] | None = None
) -> Path:
    """A DVC repository with {stage: (stages it needs, script)}; stage `a` leaves the file `a.out`.

    Its params.yaml is the project's, without tracking, and with what `runtime` says.
    """
    root.mkdir(exist_ok=True)
    Repo.init(str(root), no_scm=True).close()
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n")
    described = {}
    for name, (needs, script) in stages.items():
        (root / f"{name}.py").write_text(f"{script}\nimport pathlib\npathlib.Path('{name}.out').write_text('done')\n")
        described[name] = {
            "cmd": f"python {name}.py",
            "deps": [f"{name}.py", *(f"{need}.out" for need in needs)],
            "outs": [f"{name}.out"],
        }
    shutil.copy(PROJECT / "params.yaml", root)
    params.rewrite(root / "params.yaml", {"runtime": {"tracking": {"enabled": False}, **(runtime or {})}})
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": described}, sort_keys=False))
    return root


def wait_until(true: Callable[[], object], seconds: float = 200.0) -> None:
    """Return when it is true; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def pid_in(file: Path) -> int:
    """The process id that a stage wrote, once it has."""
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())
