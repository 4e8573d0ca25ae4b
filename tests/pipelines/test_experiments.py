"""DVC's clones for experiments find the resumable state of the user's repository, and go on from it."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_nothing_left_behind import Command, alive, environment, fresh, group, prepared, running  # noqa: F401
from toy import wait_until

from pipelines.processes.lock import holder

pytestmark = pytest.mark.acceptance


def dvc(root: Path, *arguments: str) -> str:
    """What a command of DVC says; through a file, since a worker that it leaves behind would keep a pipe open."""
    command = [sys.executable, "-P", "-m", "dvc", *arguments]
    with (root / "said.log").open("w+") as said:
        subprocess.run(command, cwd=root, env=environment(root), stdout=said, stderr=said, timeout=120)
        said.seek(0)
        return said.read()


@pytest.fixture
def committed(prepared: Path, tmp_path: Path) -> Path:  # noqa: F811
    root = fresh(prepared, tmp_path)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", *author, "commit", "-qm", "prepared"], cwd=root, check=True)
    return root


def stopped_experiment(root: Path) -> tuple[int, int]:
    """Run one in a temporary clone until it trains, end it; the steps that it resumed at and saved."""
    with running(root, [sys.executable, "-P", "-m", "dvc", "exp", "run", "--temp", "pretrain"]) as started:
        below = started.trains()
        group(signal.SIGTERM)(started.process)
        started.process.wait(120)
        wait_until(lambda: not any(alive(process) for process in below), 120)
    resumed = [
        int(m[1].replace(",", "")) for line in started.lines if (m := re.search(r"resuming after step ([\d,]+)", line))
    ]
    return (resumed or [0])[0], started.saved_step()


def test_an_experiment_in_a_temporary_clone_resumes_another_ones_state(committed: Path) -> None:
    started, saved = stopped_experiment(committed)
    assert started == 0 and saved > 0
    assert stopped_experiment(committed)[0] == saved


def test_a_queued_experiment_resumes_it_too(committed: Path) -> None:
    _, saved = stopped_experiment(committed)
    dvc(committed, "exp", "run", "--queue", "--name", "queued", "pretrain")
    (lock,) = committed.glob(".work/pretrain/*/lock")
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "dvc", "queue", "start"],
        cwd=committed,
        env=environment(committed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: "resuming after step" in dvc(committed, "queue", "logs", "queued"), 200)
        said = dvc(committed, "queue", "logs", "queued")
        assert f"resuming after step {saved:,}" in said
    finally:
        dvc(committed, "queue", "kill", "--force", "queued")
        group(signal.SIGTERM)(worker)  # DVC's worker, which would wait for more
        worker.wait(60)
    wait_until(lambda: not holder(lock), 100)
