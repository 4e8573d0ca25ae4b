"""One stage as a subprocess that cannot outlive us, nor its time limit.

A stage runs as `dvc --wait-for-lock repro -s STAGE`: `-s` lets siblings run at once, the wait keeps a finished
command from being lost because a sibling held the lock for a moment.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self, TextIO

from pipelines import paths
from pipelines.processes import warden

LAST_LINES = 20


class Outcome(StrEnum):
    """What DVC did with a stage."""

    RAN = "ran"
    UNCHANGED = "unchanged"
    RESTORED = "restored from cache"
    FAILED = "failed"
    OVERTIME = "ended at its time limit"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class StageResult:
    """How one stage, or another command of DVC, went.

    Attributes:
        stage: Its name.
        outcome: What became of it.
        exit_code: Of the command.
        seconds: By the clock on the wall.
        last_lines: Of its output.
        rerun: The command that a person types to run it again.
        log: File of all that it said; None if it said nothing.
    """

    stage: str
    outcome: Outcome
    exit_code: int
    seconds: float
    last_lines: tuple[str, ...]
    rerun: str = ""
    log: Path | None = None


def rerun_command(stage: str) -> str:
    """The command a person types to run `stage` again, with what it needs."""
    ours = Path(sys.executable).parent
    dvc = shutil.which("dvc")
    if dvc and Path(dvc).parent == ours:
        return shlex.join(["dvc", "repro", stage])
    python = Path(sys.executable)  # no activated environment: then dvc.yaml's `python` is not found either
    with suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "pipelines.flow", stage])


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment with this interpreter's folder first on PATH, and Python's output unbuffered."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(extra or {})}


def start_warded(
    command: list[str], *, grace_seconds: float, env: Mapping[str, str], stdout: int, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Start `command` in `cwd` under a warden: it ends, and all it started, when `stdin` is closed or we die."""
    script = [sys.executable, "-I", "-S", warden.__file__, str(grace_seconds)]
    return subprocess.Popen(
        script + command,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=env,
        cwd=cwd,
        start_new_session=True,  # Ctrl-C in the terminal reaches us, and we end the stage in order
    )


# What DVC says around a stage's own output, and nobody needs when the stage's name and outcome are shown.
CHATTER = (
    "Running stage '",
    "Updating lock file '",
    "Generating lock file '",
    "To track the changes with git, run:",
    "To enable auto staging, run:",
    "\tgit add ",
    "\tdvc config core.autostage",
    "Use `dvc push` to send your updates to remote storage.",
    "Data and pipelines are up to date.",
)


class Verdict:
    """Reads from DVC's own words what it did with a stage."""

    def __init__(self, stage: str):
        self.outcome: Outcome | None = None
        self.words = {
            f"Running stage '{stage}':": Outcome.RAN,
            f"Stage '{stage}' didn't change, skipping": Outcome.UNCHANGED,
            f"'{stage}' didn't change, skipping": Outcome.UNCHANGED,
            f"Stage '{stage}' is cached - skipping run, checking out outputs": Outcome.RESTORED,
        }

    def hears(self, line: str) -> bool:
        """Take note of a line of output; whether it is DVC's and need not be shown."""
        if self.outcome is None and line in self.words:
            self.outcome = self.words[line]
            return True
        return line.startswith(CHATTER)


def tell(process: subprocess.Popen[str], word: bytes) -> None:
    """Say a word to a warden; nothing if it has ended."""
    assert process.stdin is not None
    with suppress(BrokenPipeError, ValueError):  # ValueError: the pipe is closed already
        os.write(process.stdin.fileno(), word)


def close(process: subprocess.Popen[str]) -> None:
    """Close our ends of an ended process's pipes."""
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


class Words:
    """What a command says: every line to its reader and into a log file of its own, the last ones kept."""

    def __init__(self, name: str, on_line: Callable[[str], None], is_chatter: Callable[[str], bool]):
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.on_line, self.is_chatter = on_line, is_chatter
        self.path = paths.LOGS / f"{name.replace(os.sep, '-')}.log"
        self.file: TextIO | None = None

    def hear(self, line: str) -> None:
        """Take a line in."""
        if not (text := line.rstrip()) or self.is_chatter(text):
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", encoding="utf-8")
        self.file.write(f"{text}\n")
        self.file.flush()
        self.last.append(text)
        self.on_line(text)

    @property
    def log(self) -> Path | None:
        """The log file, if anything was said."""
        return self.path if self.file else None


class StageRunner:
    """Runs stages of the current directory's repository, several at once from threads; leaving it ends them all.

    Args:
        grace_seconds: between TERM, on which a trainer saves, and KILL.
        force: run also what DVC holds to be unchanged.
        env: added to the stages' environment.
    """

    def __init__(
        self,
        *,
        grace_seconds: float = 60.0,
        force: bool = False,
        env: Mapping[str, str] | None = None,
    ):
        self.grace_seconds = grace_seconds
        self.force = force
        self.env = child_environment(env)
        self.ending = False
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def run(self, stage: str, on_line: Callable[[str], None], limit_minutes: float | None = None) -> StageResult:
        """Run one stage to its end; each line of its output goes to `on_line` as it comes.

        Args:
            stage: Its name.
            on_line: Called with a line that is not DVC's own.
            limit_minutes: Its processes are ended after so long, a trainer saves first; None: no limit.
        """
        verdict = Verdict(stage)
        words = Words(stage, on_line, verdict.hears)
        command = ["repro", "-s", *(["--force"] if self.force else []), stage]
        result = self._follow(stage, command, words, limit_minutes)
        outcome = verdict.outcome if result.outcome is Outcome.RAN and verdict.outcome else result.outcome
        return replace(result, outcome=outcome, rerun=rerun_command(stage))

    def would_run(self, stage: str) -> bool:
        """Whether `run` would find work to do; in doubt it would."""
        verdict = Verdict(stage)
        words = Words(stage, lambda line: None, lambda line: verdict.hears(line) or True)
        self._follow(stage, ["repro", "-s", "--dry", stage], words)
        return self.force or verdict.outcome is not Outcome.UNCHANGED

    def dvc(self, name: str, command: Sequence[str], on_line: Callable[[str], None]) -> StageResult:
        """Run another command of DVC's, as a step with a name of its own."""
        words = Words(name, on_line, lambda line: False)
        return replace(self._follow(name, command, words), rerun=shlex.join(["dvc", *command]))

    def _follow(
        self, name: str, command: Sequence[str], words: Words, limit_minutes: float | None = None
    ) -> StageResult:
        """Run one command of DVC's to its end, or to its limit."""
        began = time.monotonic()
        with self.lock:
            if self.ending:
                return StageResult(name, Outcome.CANCELLED, 1, 0.0, ())
            process = start_warded(
                [sys.executable, "-P", "-m", "dvc", "--wait-for-lock", *command],
                grace_seconds=self.grace_seconds,
                env=self.env,
                stdout=subprocess.PIPE,
            )
            self.running[name] = process
        assert process.stdout is not None
        try:
            with self._limit(process, limit_minutes) as limit:
                for line in process.stdout:
                    words.hear(line)
        except BaseException:
            tell(process, warden.END)
            process.stdout.read()  # a trainer that saves may still print
            raise
        finally:
            code = process.wait()
            with self.lock:
                del self.running[name]
                close(process)
                if words.file:
                    words.file.close()
        outcome = Outcome.RAN
        if code:
            outcome = Outcome.CANCELLED if self.ending else Outcome.OVERTIME if limit.is_set() else Outcome.FAILED
        return StageResult(name, outcome, code, time.monotonic() - began, tuple(words.last), log=words.log)

    @contextmanager
    def _limit(self, process: subprocess.Popen[str], minutes: float | None) -> Iterator[threading.Event]:
        """End the process when the time is over; yields whether that has happened."""
        over = threading.Event()

        def end() -> None:
            with self.lock:
                if process.poll() is None:
                    over.set()
                    tell(process, warden.END)

        timer = threading.Timer(60 * (minutes or 0), end)
        timer.daemon = True
        if minutes is not None:
            timer.start()
        try:
            yield over
        finally:
            timer.cancel()

    def end(self) -> None:
        """End what runs, and start nothing any more; returns when nothing is left.

        Each stage has the grace period to save. A KeyboardInterrupt meanwhile (a second Ctrl-C) ends it at once.
        """
        with self.lock:
            self.ending = True
            processes = list(self.running.values())
        try:
            self._end(processes, warden.END)
        except KeyboardInterrupt:
            self._end(processes, warden.HURRY)
            raise

    def _end(self, processes: list[subprocess.Popen[str]], word: bytes) -> None:
        with self.lock:
            for process in processes:
                tell(process, word)
        for process in processes:
            process.wait()
