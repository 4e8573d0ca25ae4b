"""Real ticks: a real server, a real schedule of seconds, real processes. What they run is a toy of one stage."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from listener import Listener, listening
from prefect_witness import Server, environment, started
from toy import PROJECT, lives, pid_in, repository, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")]

READS = "print(open('watched').read())"  # a file that DVC knows as the stage's dependency
SLOW = "import time; print('slow'); time.sleep({})"
# Saves when it is told to end, and goes on from there.
RESUMES = """
import os, pathlib, signal, sys, time
saved = pathlib.Path("saved")
def save(number, frame):
    saved.write_text("half")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("pid").write_text(str(os.getpid()))
print("resuming" if saved.exists() else "beginning", flush=True)
time.sleep(0 if saved.exists() else 120)
"""


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Making its database takes a while, so all tests share it."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        server = Server(home)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as webhook:
        yield webhook


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.since = datetime.now(UTC).isoformat()
    return one_server


def toy(tmp_path: Path, script: str, webhook: str | None = None, **rules: object) -> Path:
    """One stage, in a folder that names a deployment of its own: late runs of another test's would be run too."""
    plain = {"retries": 0, "delay_seconds": 0.5, "limit_minutes": None, "gpu": False}
    tmp_path.mkdir(exist_ok=True)
    settings = {"stages": {"pretrain": {**plain, **rules}}, "webhook": webhook}
    return repository(tmp_path / tmp_path.name, {"pretrain": ([], script)}, settings)


def serve(*options: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.serve", *options]


def test_ticks_run_what_changed_say_when_nothing_did_and_outlive_a_servers_restart(tmp_path, server, listener):
    root = toy(tmp_path, READS, webhook=listener.address)
    described = (root / "dvc.yaml").read_text().replace("- pretrain.py", "- pretrain.py\n    - watched")
    (root / "dvc.yaml").write_text(described)
    (root / "watched").write_text("first")
    with started(serve("--every", "4s"), root, server, "serve.log") as serving:
        wait_until(lambda: server.count("Completed") == 1 and server.count("Unchanged") >= 1)
        told = server.runs("Unchanged")[0]
        assert told["state"]["message"].startswith("Nothing changed: 1 stage is as it was")
        assert told["total_run_time"] < 60
        server.stop()
        time.sleep(6)
        (root / "watched").write_text("second")
        server.start()
        wait_until(lambda: server.count("Completed") == 2)
        before = server.count("Unchanged")
        wait_until(lambda: server.count("Unchanged") > before)
        assert server.count("Completed") == 2
        assert not server.count("Failed")
        assert serving.poll() is None
    assert serving.returncode == 0
    assert {"first", "second"} <= set((root / "serve.log").read_text().split())
    told = [said["text"] for _, said in listener.heard]  # of what ran, not of ticks that found nothing to do
    assert len(told) == 2 and all(f"{root.name}: " in text and "1 stage, 1 ran" in text for text in told), told


def test_a_tick_while_one_runs_is_cancelled(tmp_path, server):
    root = toy(tmp_path, SLOW.format(25))
    with started(serve("--every", "5s"), root, server, "serve.log"):
        wait_until(lambda: server.count("Completed") == 1)
    cancelled = [run["state"]["message"] for run in server.runs("Cancelled")]
    assert any(message.startswith("A tick runs here already (process ") for message in cancelled)
    assert not server.count("Failed", "Crashed")
    said = (root / "serve.log").read_text()
    assert "this one is left out" in said
    assert "at capacity" not in said and "Traceback" not in said


def test_a_tick_while_one_runs_waits_on_request_and_all_that_were_missed_meanwhile_are_one(tmp_path, server):
    root = toy(tmp_path, SLOW.format(25))
    with started(serve("--every", "5s", "--queue"), root, server, "serve.log"):
        wait_until(lambda: server.count("Completed") == 1)
        first = server.runs("Completed")[0]
        wait_until(lambda: server.count("Unchanged") >= 1)
        following = server.runs("Unchanged")[0]
    assert following["expected_start_time"] < first["end_time"]  # it was due, and waited
    cancelled = server.runs("Cancelled")
    assert not [run for run in cancelled if "already" in run["state"]["message"]]
    covered = [run for run in cancelled if "covers it" in run["state"]["message"]]
    assert len(covered) >= 2  # 25 s hold five ticks


def test_of_the_ticks_missed_while_nobody_served_one_runs_and_what_was_killed_is_called_crashed(tmp_path, server):
    root = toy(tmp_path, RESUMES)
    with started(serve("--every", "3s"), root, server, "serve.log") as serving:
        pid = pid_in(root / "pid")
        flow = [run for run in server.runs("Running") if run["total_run_time"] >= 0]
        assert flow
        kill_all_of(serving)
    wait_until(lambda: not lives(pid))
    assert (root / "saved").read_text() == "half"
    time.sleep(12)
    back = datetime.now(UTC).isoformat()
    with started(serve("--every", "1h"), root, server, "serve.log"):
        wait_until(lambda: server.count("Completed") == 1)
        wait_until(lambda: server.count("Crashed") == 1)
    missed = [run for run in server.runs() if flow[0]["expected_start_time"] < run["expected_start_time"] < back]
    assert len(missed) >= 4
    assert sum(run["state_name"] != "Cancelled" for run in missed) <= 1
    assert "resuming" in (root / "serve.log").read_text()


def kill_all_of(process: subprocess.Popen[bytes]) -> None:
    """Kill the server of ticks and the flow that it runs; what wards the stage stays, as it does on every death."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in [everyone[0], *(one for one in everyone if "prefect.engine" in one.cmdline())]:
        one.send_signal(signal.SIGKILL)
    process.wait()


def prefect(root: Path, server: Server, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=root,
        env=environment(server.address, server.home) | {"PWD": str(root)},  # as a shell has it; prefect.yaml reads it
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_cancelled_tick_lets_the_trainer_save_and_the_next_one_resumes(tmp_path, server):
    root = toy(tmp_path, RESUMES)
    with started(serve("--every", "30s"), root, server, "serve.log"):
        pid = pid_in(root / "pid")
        prefect(root, server, "flow-run", "cancel", server.runs("Running")[0]["id"])
        wait_until(lambda: server.count("Cancelled"))
        assert not lives(pid)
        assert (root / "saved").read_text() == "half"
        wait_until(lambda: server.count("Completed") == 1)
    assert "resuming" in (root / "serve.log").read_text()
    assert (root / "pretrain.out").exists()


def test_a_flow_started_by_hand_can_be_cancelled_too(tmp_path, server):
    root = toy(tmp_path, RESUMES)
    with started([sys.executable, "-m", "pipelines.flow"], root, server, "flow.log") as flow:
        pid = pid_in(root / "pid")
        prefect(root, server, "flow-run", "cancel", server.runs("Running")[0]["id"])
        assert flow.wait(60) == 1
    assert not lives(pid)
    assert (root / "saved").read_text() == "half"
    assert server.count("Cancelled") == 1
    assert "Traceback" not in (root / "flow.log").read_text()


def test_two_flows_do_not_train_on_one_gpu_and_a_failed_stage_is_tried_again(tmp_path, server):
    fails_once = """
import pathlib, sys, time
if not pathlib.Path("tried").exists():
    pathlib.Path("tried").touch()
    sys.exit("a lost connection")
began = time.time()
time.sleep(6)
pathlib.Path("times").write_text(f"{began} {time.time()}")
"""
    roots = [toy(tmp_path / name, fails_once, retries=1, gpu=True) for name in "ab"]
    command = [sys.executable, "-m", "pipelines.flow"]
    with started(command, roots[0], server, "flow.log") as one, started(command, roots[1], server, "flow.log") as other:
        assert (one.wait(170), other.wait(170)) == (0, 0)
    (began, ended), (began_too, ended_too) = (
        [float(t) for t in (root / "times").read_text().split()] for root in roots
    )
    assert ended <= began_too or ended_too <= began
    said = [(root / "flow.log").read_text() for root in roots]
    assert any("waiting for slot gpu-" in words for words in said)
    assert all("Retry 1/1" in words and "a lost connection" in words for words in said)


def test_a_time_limit_lets_the_trainer_save_and_fails_the_run_with_words(tmp_path, server):
    root = toy(tmp_path, RESUMES, limit_minutes=0.5, retries=3)
    done = run_flow(root, server)
    assert done.returncode == 1
    assert "pretrain was ended at its time limit, after 0." in done.stdout
    assert ".work/logs/pretrain.log" in done.stdout
    assert (root / "saved").read_text() == "half"
    assert not lives(pid_in(root / "pid"))
    assert run_flow(root, server).returncode == 0  # the next run resumes


def run_flow(root: Path, server: Server) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.flow"],
        cwd=root,
        env=environment(server.address, server.home),
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_the_deployment_of_prefect_yaml_runs_by_a_process_worker_and_can_be_cancelled(tmp_path, server):
    root = toy(tmp_path, RESUMES)
    (root / "prefect.yaml").write_text((PROJECT / "prefect.yaml").read_text())
    prefect(root, server, "work-pool", "create", "dino", "--type", "process")
    prefect(root, server, "--no-prompt", "deploy", "--all")
    with started([sys.executable, "-m", "prefect", "worker", "start", "--pool", "dino"], root, server, "worker.log"):
        prefect(root, server, "deployment", "run", "dino-tick/nightly")
        pid = pid_in(root / "pid")
        prefect(root, server, "flow-run", "cancel", server.runs("Running")[0]["id"])
        wait_until(lambda: server.count("Cancelled"))
        assert not lives(pid)
        assert (root / "saved").read_text() == "half"
        prefect(root, server, "deployment", "run", "dino-tick/nightly")
        wait_until(lambda: server.count("Completed") == 1)
    assert (root / "pretrain.out").exists()
