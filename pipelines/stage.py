"""How a stage runs: settings in, user errors as one clear message, seconds noted outside DVC."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

from dino.files import whole_file
from pipelines import params, paths

USER_ERRORS = (ValueError, FloatingPointError, OSError)
EXIT_ERROR = 1
EXIT_REQUEUE = 75  # EX_TEMPFAIL: interrupted with its state saved; run the same command again
SHOW_TRACEBACK = "DINO_TRACEBACK"


class Requeue(SystemExit):
    """The stage was asked to stop and saved what it had; running it again goes on from there."""


def run_stage(name: str, main: Callable[[params.Params], None]) -> None:
    """Run one stage and leave the process with its exit code."""
    began = time.perf_counter()
    try:
        main(params.load())
    except Requeue as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
    except USER_ERRORS as error:
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exc()
        print(f"\n{name} failed: {error}\n(set {SHOW_TRACEBACK}=1 to see where in the code)", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    note_seconds(name, time.perf_counter() - began)


def note_seconds(name: str, seconds: float) -> None:
    """Remember how long a stage's last real execution took, in `.work/seconds.json`; a race loses a line at worst."""
    path = paths.work_dir() / "seconds.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    with whole_file(path) as aside:
        aside.write_text(json.dumps({**known, name: round(seconds, 2)}, indent=2))
