"""Files that appear whole or not at all, and what is said where the disk does not take them."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT = "nothing half-written stays, and what was there before is as it was"


@contextmanager
def whole_file(path: str | Path, needs_bytes: int = 0) -> Iterator[Path]:
    """Give a place aside to write to; when the block ends well, flush it to the disk and rename it to `path`.

    When the block raises, what was written is removed and an older `path` stays as it was. Parent folders are
    created. The place aside has the suffix of `path`: some writers choose the format by it.

    Args:
        path: where the file shall appear.
        needs_bytes: its size, if it is known before: said when there is no room for it.

    Raises:
        OSError: the disk is full or the place can't be written to; the message says what is needed and what to do.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()  # before the work that is to be written, not after it
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has this name", str(path))
    except OSError as error:
        _remove(aside)
        raise OSError(no_room(path, needs_bytes) if lacks_room(error) else not_writable(path, error)) from error
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        flush_folder(path.parent)
    except Exception as error:
        if not lacks_room(error):
            raise
        needs_bytes = max(needs_bytes, aside.stat().st_size + 1)
        _remove(aside)  # first, so that its own bytes count as free
        raise OSError(no_room(path, needs_bytes)) from error
    finally:
        _remove(aside)


def flush_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk: until then a loss of power may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(file: Path) -> None:
    with suppress(OSError):  # it is gone, or its folder is none: then the first error is the one to tell
        file.unlink()


def lacks_room(error: BaseException) -> bool:
    """Whether a full disk, a quota or a limit on file sizes is the cause; safetensors tells it in words only."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    return any(f"(os error {number})" in str(error) for number in NO_ROOM)


def no_room(path: Path, needs_bytes: int) -> str:
    """What to say when there is no room for a file of this size at least."""
    free = shutil.disk_usage(path.parent).free
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if free > needs_bytes and limit != resource.RLIM_INFINITY:
        have = f"files of this process may have {in_bytes(limit)} (ulimit -f): raise that limit"
    else:
        have = f"{in_bytes(free)} are free in {path.parent.absolute()}: make room"
    return f"no room for {path}: it needs {in_bytes(needs_bytes)} at least, {have} and run it again; {KEPT}"


def not_writable(path: Path, error: OSError) -> str:
    """What to say when a file can't be written at this place."""
    place = f" ({error.filename})" if error.filename and Path(error.filename).parent != path.parent else ""
    return (
        f"can't write {path}: {(error.strerror or str(error)).lower()}{place}; make {path.parent.absolute()} a folder "
        f"that this user may write to; {KEPT}"
    )


def in_words(error: OSError) -> str:
    """An error of the operating system with its place and a cure, where it has none yet."""
    if error.errno is None:  # told by us
        return str(error)
    what = f"{(error.strerror or 'unknown error').lower()}: {error.filename or 'no file named'}"
    cures = dict.fromkeys(NO_ROOM, "make room on the disk and run it again")
    cures |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give this user access to it, and run it again")
    cures |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "a file and a folder stand in each other's way")
    return f"{what}; {cures.get(error.errno, 'look whether the disk is there and whole')}"


def in_bytes(count: float) -> str:
    """A number of bytes for people: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
