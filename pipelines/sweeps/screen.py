"""How far a sweep is: a line for each experiment that ends, and below, on a terminal, those that run with their ETA."""

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.processes.progress import duration, seconds_between_lines


@dataclass
class Running:
    """One that runs: since when, what it does, and when that was told last."""

    began: float = field(default_factory=time.monotonic)
    stage: str = "starting"
    note: str = ""
    told: float = field(default_factory=time.monotonic)


class Screen:
    """Shows it. Lines about progress come now and then where there is no terminal."""

    def __init__(self, console: Console, total: int, jobs: int) -> None:
        """`total` experiments are to run, `jobs` at once."""
        self.console, self.total, self.jobs = console, total, jobs
        self.live = console.is_terminal
        self.pause = seconds_between_lines()
        self.running: dict[str, Running] = {}
        self.seconds: list[float] = []  # of those that are done
        self.count = self.failed = 0
        self.lock = threading.Lock()
        self._live = Live(self, console=console, refresh_per_second=4, transient=True) if self.live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(Text(line), soft_wrap=True)
        sys.stdout.flush()

    def started(self, name: str) -> None:
        """An experiment began."""
        with self.lock:
            self.running[name] = Running()
        if not self.live:
            self.say(f"{name}: started")

    def at(self, name: str, what: str) -> None:
        """It came to a stage (one word), or said how far it is (a line of progress)."""
        with self.lock:
            one = self.running[name]
            if " " in what:
                one.note = what.removeprefix(f"{one.stage}: ")
            else:
                one.stage, one.note = what, ""
            now = time.monotonic()
            due = not self.live and now - one.told >= self.pause
            if due:
                one.told = now
                line = f"{name}: {one.stage} {one.note}".rstrip() + self._left(one)
        if due:
            self.say(line)

    def ended(self, name: str, told: str, ok: bool = False) -> None:
        """It ended."""
        with self.lock:
            seconds = time.monotonic() - self.running.pop(name).began
            self.count += 1
            self.failed += not ok
            if ok:
                self.seconds.append(seconds)
            summary = self._summary()
        self.say(f"{name}: {told or f'done in {duration(seconds)}'}  ({summary})")

    def _left(self, one: Running) -> str:
        if not self.seconds:
            return ""
        left = self.mean - (time.monotonic() - one.began)
        return f"; about {duration(left)} to its end" if left > 0 else ""

    @property
    def mean(self) -> float:
        """Seconds of one, so far."""
        return sum(self.seconds) / len(self.seconds)

    def _summary(self) -> str:
        words = [f"{self.count} of {self.total} ended"] + ([f"{self.failed} not done"] if self.failed else [])
        if self.seconds and self.count < self.total:
            now = time.monotonic()
            begun = sum(min(now - one.began, self.mean) for one in self.running.values())
            left = (self.mean * (self.total - self.count) - begun) / self.jobs
            words.append(f"about {duration(max(left, 0.0))} left")
        return ", ".join(words)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What runs, and how much is left."""
        with self.lock:
            table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, expand=True)
            for ratio in (None, None, None, 1):  # the last one takes what is left, and is cut there
                table.add_column(no_wrap=True, ratio=ratio)
            for name, one in self.running.items():
                spent = duration(time.monotonic() - one.began)
                left = self._left(one).removeprefix("; ")
                table.add_row(name, spent, one.stage, Text(", ".join(filter(None, (left, one.note))), style="dim"))
            yield table
            yield Text(self._summary(), style="dim")
