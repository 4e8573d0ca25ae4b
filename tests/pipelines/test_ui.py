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

from pipelines import paths, ui
from pipelines.rows import tracking

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


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("0.0.0.0", False),
     ("192.168.1.2", False), ("::", False), ("gpu7.example.org", False)],
)  # fmt: skip
def test_an_address_that_others_reach_is_known_as_such(host: str, local: bool) -> None:
    assert ui.is_local(host) == local


def test_an_address_that_this_machine_has_not_is_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match=r"--host 203\.0\.113\.7: this machine has no such address; leave it out"):
        ui.free_port(None, "203.0.113.7")


def listeners(process: subprocess.Popen[str]) -> set[str]:
    """Addresses at which the processes below this one listen, by ss."""
    family, found = {process.pid}, subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout
    parents = {int(p.parent.name): int(p.read_text().rpartition(")")[2].split()[1])
               for p in Path("/proc").glob("[0-9]*/stat")}  # fmt: skip
    for _ in parents:
        family |= {child for child, parent in parents.items() if parent in family}
    return {line.split()[3].rpartition(":")[0] for line in found.splitlines()
            if any(f"pid={pid}," in line for pid in family)}  # fmt: skip


@pytest.mark.acceptance
@pytest.mark.skipif(shutil.which("ss") is None, reason="no ss here")
@pytest.mark.parametrize(("options", "address"), [([], "127.0.0.1"), (["--host", "0.0.0.0"], "0.0.0.0")])
def test_the_pages_are_for_this_machine_unless_asked_which_is_warned_of(
    home: Path, options: list[str], address: str
) -> None:
    with make_ui(home, *options) as (_, process):
        assert listeners(process) == {address}
        process.terminate()
        assert process.stdout
        said = (home / "said").read_text() + process.stdout.read()
    assert ("WARNING: 0.0.0.0 is not this machine only. Whoever reaches port" in said) == bool(options)


@contextmanager
def make_ui(home: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`make ui` as a person starts it; the address it prints."""
    shutil.copy(REPOSITORY / paths.PARAMS, home)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipelines.ui", "--no-browser", *options]
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
        (home / "said").write_text(said)
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


def seen(home: Path, address: str) -> str:
    """What a browser without a network shows there, as HTML."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={home / 'browser'}", "--window-size=2400,1400",
               "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
               "--virtual-time-budget=60000", "--dump-dom", address]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=200).stdout


@pytest.mark.acceptance
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_person_without_a_network_sees_the_row_with_its_scores(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_row(home, monkeypatch)
    with make_ui(home) as (address, _):
        found = seen(home, address)
    for shown in ("vit_tiny/4 64x3 5 epochs", "knn/val_top1", "knn/test_top1", "0.8125", "healthy"):
        assert shown in found, shown


@pytest.mark.acceptance
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_person_sees_what_differs_beside_the_curves_and_on_a_runs_page_what_came_of_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_row(home, monkeypatch)
    Path("report/scores.png").write_bytes(evidence.PNG)
    evidence.write_lock(home)  # with these scores
    tracking.report("k1", pictures=["report/scores.png"], params=evidence.SETTINGS)
    other = {**evidence.RESOLVED, "lr_at_256": 0.0375}
    with tracking.pretraining(evidence.SETTINGS, "k2", resolved=other) as tracker:
        tracker.log_curve_points(evidence.curve_points())
    run = next(run for run in witness.runs(home) if run.data.tags["dino.key"] == "k1")
    with make_ui(home) as (address, _):
        compared = seen(home, f"{address}&compareRunsMode=CHART")
        page = seen(home, f"{address.partition('/runs?')[0]}/runs/{run.info.run_id}")
    for shown in ("Settings that differ", "pretrain.lr_at_256", "0.0375", ">Training<", ">loss<", ">Step<"):
        assert shown in compared, shown
    assert "pretrain.epochs" not in compared  # does not differ
    for shown in ("The trained backbone beats the untrained network", "#/models/dino/versions/1", "dino, version 1",
                  "digits/train", f"get-artifact?path=report/scores.png&amp;run_uuid={run.info.run_id}"):  # fmt: skip
        assert shown in page, shown


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
