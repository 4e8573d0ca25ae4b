"""Orders to end: heeded from the first moment, saved first by who asks, told of the parent's death."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from toy import PROJECT, lives, pid_in, wait_until

EXIT_REQUEUE = 75
Started = Callable[..., subprocess.Popen[str]]
LEAVE = """
import pathlib, time
from pipelines.processes import ending
ending.heed(ending.leave)
ending.watch_parent()
try:
    print("here", flush=True)
    time.sleep(60)
finally:
    pathlib.Path("tidied").touch()
"""
SAVE = """
import pathlib, time
from pipelines.processes import ending
ending.heed(ending.leave)
ending.watch_parent()
stop = ending.StopRequest()
pathlib.Path("ready").touch()
print("here", flush=True)
until = time.monotonic() + 60
while not stop():
    assert time.monotonic() < until
    time.sleep(0.01)
pathlib.Path("saving").touch()
time.sleep({slow})
pathlib.Path("saved").touch()
"""
START = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen({command!r})
pathlib.Path("pid").write_text(str(child.pid))
child.wait()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return tmp_path


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts a process, which has said that it is there."""
    with ExitStack() as stack:

        def start(code: str, *prefix: str) -> subprocess.Popen[str]:
            command = [*prefix, sys.executable, "-c", code]
            process = stack.enter_context(subprocess.Popen(command, stdout=-1, stderr=-1, text=True))
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            return process

        yield start


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_stage_leaves_in_order_says_so_and_asks_to_be_run_again(here: Path, started: Started, number: str) -> None:
    process = started(LEAVE)
    process.send_signal(signal.Signals[number])
    _, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_REQUEUE
    assert err == f"interrupted by {number}; nothing half-written stays, run the same command again\n"
    assert (here / "tidied").exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_who_asks_saves_first(here: Path, started: Started, number: str) -> None:
    process = started(SAVE.format(slow=0))
    process.send_signal(signal.Signals[number])
    assert process.wait(20) == 0
    assert (here / "saved").exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_the_second_order_ends_at_once(here: Path, started: Started, number: str) -> None:
    process = started(SAVE.format(slow=50))
    process.send_signal(signal.Signals[number])
    wait_until((here / "saving").exists, 20)
    process.send_signal(signal.Signals[number])
    assert process.wait(20) in (-signal.Signals[number], 1)  # 1: Python's own KeyboardInterrupt
    assert not (here / "saved").exists()


def test_a_schedulers_warning_before_the_order_is_not_the_first_of_two(here: Path, started: Started) -> None:
    process = started(SAVE.format(slow=1))
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
    assert process.wait(20) == 0
    assert (here / "saved").exists()


def test_nohup_stays_deaf_to_a_closed_terminal(here: Path, started: Started) -> None:
    process = started(SAVE.format(slow=0), "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_the_parents_death_is_an_order(here: Path) -> None:
    command = [sys.executable, "-c", SAVE.format(slow=0.5)]
    parent = subprocess.Popen([sys.executable, "-c", START.format(command=command)], stdout=subprocess.DEVNULL)
    pid = pid_in(here / "pid")
    wait_until((here / "ready").exists, 20)
    parent.kill()
    parent.wait()
    wait_until(lambda: not lives(pid), 20)
    assert (here / "saved").exists()


def test_the_parents_death_is_not_the_second_of_two_orders(here: Path) -> None:
    """A group gets TERM: the parent dies at once, the child has been told, and saves."""
    command = [sys.executable, "-c", SAVE.format(slow=1.5)]
    parent = subprocess.Popen(
        [sys.executable, "-c", START.format(command=command)], stdout=subprocess.DEVNULL, start_new_session=True
    )
    pid = pid_in(here / "pid")
    wait_until((here / "ready").exists, 20)
    os.killpg(parent.pid, signal.SIGTERM)
    parent.wait()
    wait_until(lambda: not lives(pid), 20)
    assert (here / "saved").exists()


@pytest.mark.parametrize("below_dvc", [False, True])
def test_nohup_outlives_the_shell_but_not_dvc(below_dvc: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if below_dvc:
        monkeypatch.setenv("DVC_STAGE", "pretrain")
    command = ["nohup", sys.executable, "-c", SAVE.format(slow=0)]
    parent = subprocess.Popen(
        [sys.executable, "-c", START.format(command=command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = pid_in(here / "pid")
    wait_until((here / "ready").exists, 20)
    parent.kill()
    parent.wait()
    if below_dvc:
        wait_until(lambda: not lives(pid), 20)
    else:
        time.sleep(1.2)
        assert lives(pid)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not lives(pid), 20)
    assert (here / "saved").exists()


def test_the_end_of_the_thread_that_started_us_is_not_the_parents_death(here: Path) -> None:
    code = textwrap.dedent("""
        import subprocess, sys, threading, time
        started = []
        def start():
            started.append(subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=-1, text=True))
            started[0].stdout.readline()
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        time.sleep(1.2)
        assert started[0].poll() is None
        started[0].terminate()
        assert started[0].wait(20) == 0
    """)
    assert subprocess.run([sys.executable, "-c", code, SAVE.format(slow=0)]).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells on Linux only")
def test_a_command_that_is_not_ours_gets_term_when_its_parent_dies(here: Path) -> None:
    heard = "trap 'touch told; exit' TERM; echo here; sleep 30 & wait"
    command = [sys.executable, "-m", "pipelines.processes.ending", "sh", "-c", heard]
    with subprocess.Popen(
        [sys.executable, "-c", START.format(command=command)], stdout=-1, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "here\n"
        pid = pid_in(here / "pid")
        parent.kill()
        parent.wait()
        wait_until(lambda: not lives(pid), 20)
        os.killpg(parent.pid, signal.SIGKILL)  # the sleep
    assert (here / "told").exists()
