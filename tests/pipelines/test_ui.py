import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import evidence
import mlflow_witness as witness
import pytest

from pipelines import paths, tracking, ui

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own
REPOSITORY = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def listening(port: int = 0) -> Iterator[int]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_that_is_taken_is_refused_with_a_cure() -> None:
    with listening() as taken, pytest.raises(ValueError, match=rf"port {taken} is in use.*--port {taken + 1}"):
        ui.free_port(taken)


def test_without_a_wish_the_next_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as taken:
        monkeypatch.setattr(ui, "PORT", taken)
        assert taken < ui.free_port(None) < taken + ui.PORTS_TRIED


@contextmanager
def make_ui(home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`make ui` as a person starts it; the address it prints."""
    shutil.copy(REPOSITORY / paths.PARAMS, home)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipelines.ui", "--no-browser"]
    process = subprocess.Popen(command, cwd=home, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watchdog = threading.Timer(150, process.kill)
    watchdog.start()
    said = ""
    try:
        assert process.stdout
        for line in process.stdout:
            said += line
            if found := re.search(r"Experiments: (http://127\.0\.0\.1:\d+/\S+)", line):
                break
        else:
            pytest.fail(f"no address: {said}")
        yield found[1], process
    finally:
        watchdog.cancel()
        process.terminate()
        process.communicate()


def a_row(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 120.0)
    evidence.lay(home)
    with tracking.pretraining(evidence.SETTINGS, "k1", resolved=evidence.RESOLVED) as tracker:
        tracker.log_curve_points(evidence.curve_points())
    tracking.evaluation("k1", "knn", evidence.scores(0.8125), params=evidence.SETTINGS)


def server_of(address: str) -> str:
    return address.partition("/#")[0]


@pytest.mark.acceptance
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_person_without_a_network_sees_the_row_with_its_scores(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_row(home, monkeypatch)
    with make_ui(home) as (address, _):
        assert CHROMIUM
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   f"--user-data-dir={home / 'browser'}", "--window-size=2400,1000",
                   "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                   "--virtual-time-budget=60000", "--dump-dom", address]  # fmt: skip
        seen = subprocess.run(command, capture_output=True, text=True, timeout=200).stdout
    for shown in ("vit_tiny/4 64x3 5 epochs", "knn/val_top1", "knn/test_top1", "0.8125", "healthy"):
        assert shown in seen, shown


@pytest.mark.acceptance
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_command_however_that_ends(home: Path, number: signal.Signals) -> None:
    with make_ui(home) as (address, process):
        experiment = address.split("/experiments/")[1].split("/")[0]
        question = f"{server_of(address)}/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        with urllib.request.urlopen(question) as answer:
            tags = {t["key"]: t["value"] for t in json.load(answer)["experiment"]["tags"]}
        assert "metrics.`knn/val_top1`" in json.loads(tags["mlflow.sharedViewState.dino"])["selectedColumns"]
        process.send_signal(number)
        process.wait(30)
        patience = time.monotonic() + 30
        with pytest.raises(OSError):
            while time.monotonic() < patience:
                urllib.request.urlopen(f"{server_of(address)}/health", timeout=2).close()
                time.sleep(0.2)
    assert witness.runs(home) == []
