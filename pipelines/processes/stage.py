"""How a stage runs: settings in, user errors as one clear message, an exit code out."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

from dino.files import in_words
from pipelines import launch, params, paths
from pipelines.processes import ending, shortage
from pipelines.processes.ending import EXIT_REQUEUE
from pipelines.processes.lock import hold
from pipelines.processes.seconds import note_seconds

USER_ERRORS = (ValueError, FloatingPointError, OSError)
EXIT_ERROR = 1
FIRST_RANK_SECONDS = 5.0  # torchrun sees within .1 s that a process has ended
SHOW_TRACEBACK = "DINO_TRACEBACK"


class Requeue(SystemExit):
    """The stage was asked to stop and saved what it had; running it again goes on from there (exit code 75)."""


def run_stage(name: str, main: Callable[[params.Params], None], *, shared: bool = False) -> None:
    """Run one stage and leave the process with its exit code: 0, 1 or 75.

    One process a stage and working directory (or one on each GPU, where the stage is `shared`): where DVC was killed,
    its stage may still be saving when the next `dvc repro` comes.
    """
    began = time.perf_counter()

    def work() -> None:
        settings = params.load()
        if shared and (count := launch.processes()) > 1:
            launch.across(count, f"pipelines.stages.{name}")
            return
        with only_one(name, settings.runtime.wait_for_lock_minutes):
            main(settings)

    run_command(name, work)
    note_seconds(name, time.perf_counter() - began)


def run_command(name: str, work: Callable[[], None]) -> None:
    """Do the work; where it fails, or is asked to stop, say so in one message and leave the process (1 or 75)."""
    try:
        work()
    except Requeue as stopped:
        with suppress(OSError):  # who read us may have ended too
            print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
    except (*USER_ERRORS, MemoryError, RuntimeError) as error:
        if not isinstance(error, USER_ERRORS) and not shortage.lacks_memory(error):
            raise  # a fault of ours: its place in the code is what counts
        if os.environ.get("RANK", "0") != "0":
            _let_the_first_rank_speak()
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exc()
        print(f"\n{name} failed: {told(error)}\n(set {SHOW_TRACEBACK}=1 to see where in the code)", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _let_the_first_rank_speak() -> None:
    """Most errors come to all ranks at once: the first tells it, and torchrun ends this one while it waits."""
    for number in ending.FINAL:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(FIRST_RANK_SECONDS)


def positive(text: str) -> int:
    """An option of a command: a whole number of 1 or more."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def told(error: BaseException) -> str:
    """The error in words, with its cure."""
    if isinstance(error, OSError):
        return in_words(error)
    return str(error) if isinstance(error, USER_ERRORS) else shortage.told(error)


def only_one(name: str, wait_minutes: float) -> AbstractContextManager[None]:
    """The lock of a stage in this working directory; of several ranks the first holds it for all."""
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return hold(paths.RUNNING / name, f"runs stage {name} here", wait_minutes)
