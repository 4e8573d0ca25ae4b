"""How far a long step is: a bar on a terminal, else a line now and then (logs stay short)."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0
LINE = re.compile(r"(?P<words>(?P<done>[\d,]+) of (?P<total>[\d,]+) \w+, [\d,]+/s, .+ left.*)")
BETWEEN_LINES = "DINO_PROGRESS_SECONDS"  # another number of seconds; 0: a line for every advance


class Advance(Protocol):
    """Called with how many more are done, and perhaps a new note such as "loss 4.21"."""

    def __call__(self, more: int, note: str = "") -> None:
        """Go on."""


@contextmanager
def progress(what: str, total: int | None, unit: str = "images") -> Iterator[Advance]:
    """Give a function to be called with how many more are done.

    Args:
        what: in front of every line, e.g. "prepare: reading".
        total: how many there are; None if unknown.
        unit: what is counted; "bytes" is shown as kB, MB ...
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def advance(more: int, note: str = "") -> None:
                bar.advance(task, more)
                if note:
                    bar.update(task, note=note)

            yield advance
    else:
        yield _Lines(what, total, unit)


class _Count(ProgressColumn):
    """ "12,000 of 70,000 images, 9,500/s" """

    def __init__(self, unit: str):
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        total = None if task.total is None else int(task.total)
        return Text(_count(int(task.completed), total, self.unit, task.finished_speed or task.speed or 0.0))


def seconds_between_lines() -> float:
    """DINO_PROGRESS_SECONDS, or the usual pause.

    Raises:
        ValueError: It is no number of seconds.
    """
    text = os.environ.get(BETWEEN_LINES, "")
    try:
        seconds = float(text or SECONDS_BETWEEN_LINES)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{BETWEEN_LINES} is {text!r}: choose a number of seconds, 0 or more, or unset it")
    return seconds


class _Lines:
    """A line each so many seconds; nothing for what is done sooner."""

    def __init__(self, what: str, total: int | None, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.pause = seconds_between_lines()
        self.done, self.note = 0, ""
        self.start = self.last = time.monotonic()

    def __call__(self, more: int, note: str = "") -> None:
        self.done += more
        self.note = note or self.note
        now = time.monotonic()
        if now - self.last >= self.pause:
            self.last = now
            speed = self.done / (now - self.start)
            left = "" if self.total is None else f", {duration((self.total - self.done) / speed)} left"
            note = f"; {self.note}" if self.note else ""
            print(f"{self.what} {_count(self.done, self.total, self.unit, speed)}{left}{note}", flush=True)


def heard(line: str) -> tuple[float, str] | None:
    """What a line of `progress` in a log says: percent done, and its words; None if it is another line."""
    if not (found := LINE.search(line)):
        return None
    done, total = (float(text.replace(",", "")) for text in found.group("done", "total"))
    return (min(100.0, 100 * done / total), found["words"]) if total else None


def duration(seconds: float) -> str:
    """Like `0:12 min`, `3:07 min`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes}:{rest:02} min"


def _count(done: int, total: int | None, unit: str, speed: float) -> str:
    amount = decimal if unit == "bytes" else "{:,}".format
    of = "" if total is None else f" of {amount(total)}"
    return f"{amount(done)}{of}{'' if unit == 'bytes' else ' ' + unit}, {amount(int(speed))}/s"
