"""How a stage learns that it should end: TERM, INT, HUP, USR1 (a scheduler's warning), or its parent's death.

`python -m pipelines.stages.X` heeds them from its first moment, seconds before torch is imported
(`pipelines/stages/__init__.py`), and leaves at once, by an exception, so that what is half-written is removed. A
training saves first: it puts a `StopRequest` in charge, and asks it after each step.

The parent is watched from within, by a thread: that works on Linux and macOS, and no matter which of the parent's
threads started us. `python -m pipelines.processes.ending COMMAND...` is for a command that is not ours (Linux;
elsewhere it just runs it): it gets TERM when the process that started it dies.

Only the standard library is imported.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from pipelines.processes.warden import PR_SET_PDEATHSIG, prctl

EXIT_REQUEUE = 75  # EX_TEMPFAIL: interrupted, nothing lost; run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
FINAL = (signal.SIGTERM, signal.SIGINT)  # whose second ends at once
POLL_SECONDS = 0.5


def heed(ask: Callable[[int], None]) -> None:
    """Call `ask` with the signal's number at each of SIGNALS; an ignored one (nohup's HUP) stays ignored."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number in FINAL:
            signal.signal(number, signal.SIG_DFL)
        ask(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def leave(number: int) -> None:
    """End this process in order."""
    with suppress(OSError):  # who read us may have ended too
        name = signal.Signals(number).name
        print(f"interrupted by {name}; nothing half-written stays, run the same command again", file=sys.stderr)
    sys.exit(EXIT_REQUEUE)


def watch_parent(poll_seconds: float = POLL_SECONDS) -> None:
    """Send ourselves USR1 when the process that started us has died.

    USR1, because it never ends at once: where a whole group gets TERM, the parent's death follows at its heels and
    must not count as the second order. Who started a stage by hand with nohup wants it to outlive the shell, so there
    nothing is watched; a nohup above DVC or torchrun is meant for those.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not any(
        name in os.environ for name in ("DVC_STAGE", "RANK")
    ):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=watch, name="parent's death", daemon=True).start()


class StopRequest:
    """Whether we were asked to stop; from now on the first order waits until someone asks this."""

    def __init__(self) -> None:
        self.asked = False
        heed(self._note)

    def _note(self, number: int) -> None:
        self.asked = True

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.asked


if __name__ == "__main__":
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # stays over exec
    os.execvp(sys.argv[1], sys.argv[1:])
