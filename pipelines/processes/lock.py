"""One process at a time: a lock on a file. Its holder's end frees it, whatever the end, so no lock is ever stale.

`flock` on a network file system: on NFS Linux hands it to the server, which takes it from a machine that crashed after
its lease, 90 s by default; Lustre needs the mount option `flock`. A file system that cannot lock says so, and then so
do we.
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

POLL_SECONDS = 0.2


def _try(path: Path) -> TextIO | str:
    """The locked file, or who holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with file:
                return file.read().strip() or "another process"
        except OSError as error:
            file.close()
            raise ValueError(
                f"{path.parent} lies on a file system that cannot lock ({error.strerror}), so two processes could "
                "write there at once; name a folder on another one by the environment variable DINO_ROOT"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # a file that was removed meanwhile, with its folder, locks nothing


def holder(path: Path) -> str | None:
    """Who holds the lock on this file, as "process 4711 on host"; None if nobody does."""
    if not path.exists():
        return None
    lock = _try(path)
    if isinstance(lock, str):
        return lock
    lock.close()
    return None


@contextmanager
def hold(path: Path, what: str, wait_minutes: float = 0.0) -> Iterator[None]:
    """Hold the lock on `path`, whose folders are created, while the block runs.

    Args:
        path: A file of its own; it says who holds it.
        what: What its holder does, for messages: "runs stage knn here".
        wait_minutes: For its holder's end, which is said; 0: not at all.

    Raises:
        ValueError: Another process holds it, at the end of that time too, or the file system cannot lock.
    """
    deadline = time.monotonic() + 60 * wait_minutes
    told = False
    while isinstance(lock := _try(path), str):
        if time.monotonic() >= deadline:
            waited = f" still, after {wait_minutes:g} minutes (runtime.wait_for_lock_minutes)" if wait_minutes else ""
            raise ValueError(f"{lock} {what}{waited}; wait for it or stop it")
        if not told:
            print(f"{lock} {what}: waiting for its end, up to {wait_minutes:g} minutes", file=sys.stderr, flush=True)
            told = True
        time.sleep(POLL_SECONDS)
    with lock:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield
