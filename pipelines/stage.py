"""How a stage runs: settings in, user errors as one clear message, an exit code out."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from dino.files import in_words
from pipelines import params
from pipelines.seconds import note_seconds

USER_ERRORS = (ValueError, FloatingPointError, OSError)
EXIT_ERROR = 1
EXIT_REQUEUE = 75  # EX_TEMPFAIL: interrupted with its state saved; run the same command again
EXIT_INTERRUPTED = 130  # as shells say it: 128 + SIGINT
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
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; nothing half-written stays, run the same command again", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except USER_ERRORS as error:
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exc()
        text = in_words(error) if isinstance(error, OSError) else error
        print(f"\n{name} failed: {text}\n(set {SHOW_TRACEBACK}=1 to see where in the code)", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    note_seconds(name, time.perf_counter() - began)
