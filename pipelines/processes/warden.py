"""Runs one command that does not outlive its parent: `python warden.py GRACE_SECONDS COMMAND...`.

    parent --pipe--> warden --> command --> the command's children, in a process group of their own

The parent holds the write end of a pipe that is the warden's stdin. When the parent dies in whatever way (kill -9
too), closes the pipe or writes END, the warden sends TERM to the whole group, so that a trainer saves, waits the
grace period for all of them, then KILLs what is left. HURRY cuts the wait short. The same clean-up follows when the
command itself ends and leaves children behind, so "the warden has exited" means "nothing of it runs".

A pipe, because it works on Linux and macOS, for every cause of death, and whatever thread started the command.
The command's output goes through the warden: a trainer whose reader has died must still be able to print "saving".
On Linux the warden also adopts orphans (PR_SET_CHILD_SUBREAPER), so that children in sessions of their own
(torchrun's workers) are found; elsewhere only the group is ended.

Only the standard library is imported: this file runs as a script with `-I -S`, in some 20 ms.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

END, HURRY = b"e", b"k"  # what the parent may write
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LINUX = sys.platform == "linux"
POLL_SECONDS = 0.1  # while ending: a group that other processes adopt sends no SIGCHLD
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2); nothing elsewhere."""
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(command: list[str], output: int) -> int:
    """Start `command` in a new process group, without stdin; its process id, which is the group's.

    Args:
        command: program and arguments.
        output: file descriptor that becomes its stdout and stderr.
    """
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # both sides set it: whoever comes first
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # the warden itself may be killed
        for number in (*END_SIGNALS, signal.SIGPIPE):  # Python ignores SIGPIPE, and exec would hand that on
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def descendants() -> list[int]:
    """Process ids of all children and children's children (Linux; empty elsewhere)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat") if LINUX else ():
        with contextlib.suppress(OSError):  # it ended meanwhile
            # "pid (name) state parent ...", and the name may hold spaces and brackets
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        found += new
    return found


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group (0: only ask); whether the group exists."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS: only zombies are left
        return False
    return True


def signal_each(pids: list[int], number: int) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Warden:
    """One command, its group, and the pipe to the parent."""

    def __init__(self, command: list[str], grace_seconds: float):
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.grace_seconds = grace_seconds
        self.asked_to_end = False
        self.status: int | None = None  # the command's wait status
        self.wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        for number in END_SIGNALS:
            signal.signal(number, self._end)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.output, write_end = os.pipe()
        self.group = start(command, write_end)
        os.close(write_end)
        os.set_blocking(self.output, False)
        self.reader_lives = True

    def _end(self, number: int, frame: object) -> None:
        self.asked_to_end = True

    def _reap(self) -> None:
        """Collect the status of every child that has ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.group:
                    self.status = ended[1]

    def _relay(self) -> bool:
        """Hand on one piece of what was printed; if nobody reads it any more, let it go. Whether there was any."""
        try:
            text = os.read(self.output, 65536) if self.output >= 0 else b""
        except BlockingIOError:
            return False
        if not text and self.output >= 0:  # all who could print have ended
            os.close(self.output)
            self.output = -1
        try:
            unread = text
            while self.reader_lives and unread:
                unread = unread[os.write(1, unread) :]
        except BrokenPipeError:
            self.reader_lives = False
        return bool(text)

    def _wait(self, seconds: float | None, parent: int | None) -> bytes | None:
        """Sleep until a signal, output, a word from the parent, or the time is over; the word, if there was one."""
        sources = [fd for fd in (self.wake_read, self.output, parent) if fd is not None and fd >= 0]
        ready, _, _ = select.select(sources, [], [], seconds)
        if self.wake_read in ready:
            os.read(self.wake_read, 512)
        if self.output in ready:
            self._relay()
        return os.read(parent, 1) if parent is not None and parent in ready else None

    def run(self) -> int:
        """Wait for the command, then for the end of everything it started; its exit code (128 + signal)."""
        word = None
        while self.status is None and word is None and not self.asked_to_end:
            word = self._wait(None, parent=0)
            self._reap()
        self._end_all(hurry=word == HURRY)
        code = os.waitstatus_to_exitcode(self.status) if self.status is not None else 1
        return code if code >= 0 else 128 - code

    def _end_all(self, hurry: bool) -> None:
        """TERM to whatever still runs, once each; after the grace period KILL. Returns when nothing is left."""
        deadline = time.monotonic() + self.grace_seconds
        parent: int | None = 0
        told: set[int] = set()
        while True:
            group_lives, others = signal_group(self.group, 0), descendants()
            if not group_lives and not others:
                break
            if hurry or time.monotonic() >= deadline:
                signal_group(self.group, signal.SIGKILL)
                signal_each(others, signal.SIGKILL)
            elif not group_lives:  # what left the group and lost its parent; before that, its parent tells it
                signal_each([pid for pid in others if pid not in told], signal.SIGTERM)
                told.update(others)
            elif self.group not in told:
                signal_group(self.group, signal.SIGTERM)
                told.add(self.group)
            word = self._wait(POLL_SECONDS, parent)
            hurry |= word == HURRY
            if word == b"":  # closed: nothing more will be said
                parent = None
            self._reap()
        while self._relay():
            pass


if __name__ == "__main__":
    sys.exit(Warden(sys.argv[2:], float(sys.argv[1])).run())
