import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import MEET, PROJECT, TRAIN, lives, pid_in, repository, wait_until

from pipelines.processes.runner import Outcome, StageRunner, rerun_command

# DVC's own use of pygtrie
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")


@pytest.fixture(autouse=True)
def in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_outcomes_are_dvcs_and_whether_a_stage_would_run_is_known_without_running_it(tmp_path):
    root = repository(tmp_path, {"a": ([], "print('working')")})
    lines: list[str] = []
    with StageRunner() as runner:
        assert runner.would_run("a")
        assert not (root / "a.out").exists()
        first = runner.run("a", lines.append)
        assert (first.outcome, first.exit_code) == (Outcome.RAN, 0)
        assert lines == ["> python a.py", "working"]  # and none of DVC's chatter
        assert not runner.would_run("a")
        again = runner.run("a", lines.append)
        assert (again.outcome, again.last_lines) == (Outcome.UNCHANGED, ())
        (root / "dvc.lock").unlink()
        (root / "a.out").unlink()
        assert runner.run("a", lines.append).outcome is Outcome.RESTORED
        assert (root / "a.out").read_text() == "done"
        assert lines == ["> python a.py", "working"]
    with StageRunner(force=True) as forced:
        assert forced.would_run("a")
        assert forced.run("a", lines.append).outcome is Outcome.RAN


def test_a_failing_stage_ends_with_its_last_lines_and_names_its_log_and_the_command_to_run_it_again(tmp_path):
    repository(tmp_path, {"a": ([], "for i in range(50): print('line', i)\nraise SystemExit('no such folder')")})
    log = tmp_path / ".work/logs/a.log"
    log.parent.mkdir(parents=True)
    log.write_text("line of an earlier run")
    with StageRunner() as runner:
        result = runner.run("a", lambda line: None)
        assert runner.dvc("step", ["fetch", "--nonsense"], lambda line: None).rerun == "dvc fetch --nonsense"
    assert result.outcome is Outcome.FAILED
    assert result.exit_code != 0
    assert result.last_lines[-3:-1] == ("line 49", "no such folder")
    assert "exited with 1" in result.last_lines[-1]
    assert result.log is not None and result.log.samefile(log)
    assert [line for line in log.read_text().splitlines() if line.startswith("line ")] == [
        f"line {i}" for i in range(50)
    ]
    assert result.rerun.endswith(" a")


def test_the_rerun_command_fits_the_environment(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert rerun_command("a") == "dvc repro a"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert rerun_command("a").endswith("python -m pipelines.flow a")


WAITS = """
import pathlib, sys, time
print(sys.executable)
print("ready")
until = time.monotonic() + 30
while not pathlib.Path("go").exists():
    assert time.monotonic() < until, "nobody heard"
    time.sleep(0.02)
"""


def test_output_comes_line_by_line_while_the_stage_runs_by_this_interpreter(tmp_path, monkeypatch):
    """Whatever the path says, and left alone where it ends in time."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    root = repository(tmp_path, {"a": ([], WAITS)})
    with StageRunner() as runner:
        result = runner.run("a", lambda line: (root / "go").touch() if line == "ready" else None, limit_minutes=1)
    assert result.outcome is Outcome.RAN
    assert Path(result.last_lines[-2]).parent == Path(sys.executable).parent


def test_siblings_overlap_and_both_are_recorded(tmp_path):
    stages = {"left": ([], MEET.format(me="left", other="right")), "right": ([], MEET.format(me="right", other="left"))}
    root = repository(tmp_path, stages)
    with StageRunner() as runner, ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda stage: runner.run(stage, lambda line: None), stages))
    assert [result.outcome for result in results] == [Outcome.RAN, Outcome.RAN]
    assert set(yaml.safe_load((root / "dvc.lock").read_text())["stages"]) == {"left", "right"}


def test_leaving_the_context_ends_the_stage_after_it_has_saved(tmp_path):
    root = repository(tmp_path, {"train": ([], TRAIN.format(slow=0.5))})
    results = []
    with pytest.raises(RuntimeError, match="something else"), StageRunner() as runner:
        thread = threading.Thread(target=lambda: results.append(runner.run("train", lambda line: None)))
        thread.start()
        pid = pid_in(root / "pid")
        raise RuntimeError("something else")
    assert not lives(pid)
    assert (root / "saved").read_text() == "whole"
    thread.join()
    assert results[0].outcome is Outcome.CANCELLED
    assert "saving" in results[0].last_lines
    assert runner.run("train", print).outcome is Outcome.CANCELLED  # nothing starts any more
    (root / "train.py").write_text("open('train.out', 'w').write('short')")
    with StageRunner() as next_runner:  # and no lock is left behind
        assert next_runner.run("train", print).outcome is Outcome.RAN


def test_an_error_in_the_callback_ends_the_stage(tmp_path):
    root = repository(tmp_path, {"train": ([], TRAIN.format(slow=0))})

    def refuse(line: str) -> None:
        if line == "training":
            raise RuntimeError("full")

    with StageRunner() as runner, pytest.raises(RuntimeError, match="full"):
        runner.run("train", refuse)
    assert not lives(pid_in(root / "pid"))
    assert (root / "saved").exists()


DEAF = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session={session})
pathlib.Path("child").write_text(str(child.pid))
pathlib.Path("pid").write_text(str(os.getpid()))
{then}
"""


def test_what_does_not_hear_is_killed_after_the_grace_period(tmp_path):
    root = repository(tmp_path, {"deaf": ([], DEAF.format(session=sys.platform == "linux", then="time.sleep(120)"))})
    with StageRunner(grace_seconds=1) as runner:
        threading.Thread(target=runner.run, args=("deaf", lambda line: None)).start()
        pids = [pid_in(root / "pid"), pid_in(root / "child")]
        asked = time.monotonic()
    assert 1 <= time.monotonic() - asked < 10
    assert not any(lives(pid) for pid in pids)


def test_children_that_a_stage_leaves_behind_end_with_it(tmp_path):
    root = repository(tmp_path, {"careless": ([], DEAF.format(session=False, then=""))})
    with StageRunner(grace_seconds=0.5) as runner:
        assert runner.run("careless", lambda line: None).outcome is Outcome.RAN
    assert not lives(pid_in(root / "child"))


def test_killing_the_parent_with_9_leaves_no_stage_behind(tmp_path):
    root = repository(tmp_path, {"train": ([], TRAIN.format(slow=0.5))})
    code = "from pipelines.processes.runner import StageRunner; StageRunner().run('train', print)"
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=env, stdout=subprocess.DEVNULL)
    pid = pid_in(root / "pid")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not lives(pid))
    assert (root / "saved").read_text() == "whole"


def test_a_time_limit_ends_the_process_group_after_the_trainer_has_saved(tmp_path, monkeypatch):
    """The clock is the test's own, so that its time is over when the trainer trains, however busy the machine is."""
    root = repository(tmp_path, {"train": ([], TRAIN.format(slow=0.2))})
    clocks: list[Any] = []

    class Clock:
        def __init__(self, seconds: float, end: Callable[[], None]):
            self.seconds, self.end, self.running, self.daemon = seconds, end, False, False
            clocks.append(self)

        def start(self) -> None:
            self.running = True

        def cancel(self) -> None:
            self.running = False

    monkeypatch.setattr(threading, "Timer", Clock)

    def when_it_trains(line: str) -> None:
        if line == "training" and clocks[0].running:
            clocks[0].end()

    with StageRunner() as runner:
        result = runner.run("train", when_it_trains, limit_minutes=90)
    assert result.outcome is Outcome.OVERTIME
    assert clocks[0].seconds == 5400 and not clocks[0].running
    assert not lives(pid_in(root / "pid"))
    assert (root / "saved").read_text() == "whole"
