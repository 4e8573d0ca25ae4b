"""One process of this machine at a time at MLflow's store: two at once can't create a database, and would say twice."""

import fcntl
import threading
import time
from typing import TextIO

from pipelines import paths

LOCK_SECONDS = 60.0


class _Alone:
    """One process of this machine at a time: two at once can't create the database, and would say things twice.

    A thread that holds it may take it again.
    """

    def __init__(self) -> None:
        self._thread = threading.RLock()
        self._file: TextIO | None = None
        self._depth = 0

    def __enter__(self) -> None:
        """Wait for the lock.

        Raises:
            TimeoutError: another process held it for LOCK_SECONDS.
        """
        self._thread.acquire()
        try:
            if self._depth == 0:
                self._file = self._locked()
            self._depth += 1
        except BaseException:
            self._thread.release()
            raise

    def __exit__(self, *error: object) -> None:
        """Let the next one in."""
        self._depth -= 1
        if self._depth == 0 and self._file:
            self._file.close()  # and so unlocked
            self._file = None
        self._thread.release()

    @staticmethod
    def _locked() -> TextIO:
        paths.work_dir().mkdir(parents=True, exist_ok=True)
        file = (paths.work_dir() / "mlflow.lock").open("w")
        patience = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() > patience:
                    file.close()
                    raise TimeoutError(f"another process held {file.name} for {LOCK_SECONDS:.0f} s") from None
                time.sleep(0.05)


alone = _Alone()
