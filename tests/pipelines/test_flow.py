import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelling
from prefect_witness import ask, environment
from toy import MEET, TRAIN, lives, pid_in, repository, wait_until

from pipelines.flow import main
from pipelines.flows import cancelling
from pipelines.flows.local_server import local_server
from pipelines.flows.summary import last_words, markdown
from pipelines.processes.runner import Outcome, StageResult, StageRunner

# DVC's own use of pygtrie
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

DIAMOND = {
    "dig": ([], "print('digging')"),
    "left": (["dig"], MEET.format(me="left", other="right")),
    "right": (["dig"], MEET.format(me="right", other="left")),
    "join": (["left", "right"], "print('join: 100%s joined')"),  # as stages speak under `dvc repro`
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One real Prefect server with a new database, which this process uses too; the address of its API."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with (
            local_server(home / "server.log") as address,
            temporary_settings({PREFECT_API_URL: address, PREFECT_HOME: home}),
        ):
            yield address


class Prefect:
    """What a server holds about the last flow run."""

    def __init__(self, address: str):
        self.address = address
        self.run = ask(address, "flow_runs/filter", sort="START_TIME_DESC", limit=1)[0]
        self.id = self.run["id"]

    def tasks(self, names: set[str]) -> dict[str, str]:
        """{task: state}, once the server has recorded all that are expected to have ended."""
        found: dict[str, str] = {}

        def complete() -> bool:
            tasks = ask(self.address, "task_runs/filter", flow_runs={"id": {"any_": [self.id]}})
            found.update({task["name"]: task["state_name"] for task in tasks})
            return names <= set(found) and "Running" not in found.values()

        wait_until(complete)
        return found

    def logs(self) -> list[str]:
        found = ask(self.address, "logs/filter", logs={"flow_run_id": {"any_": [self.id]}}, limit=200)
        return [log["message"] for log in found]

    def page(self) -> str:
        return ask(self.address, "artifacts/filter", artifacts={"flow_run_id": {"any_": [self.id]}})[0]["data"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.flow", *arguments]


def test_flow_is_dvcs_graph_with_siblings_in_parallel_and_runs_once(tmp_path, server, monkeypatch, capsys):
    monkeypatch.chdir(repository(tmp_path, DIAMOND))
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("4 stages, 4 ran.")
    prefect = Prefect(server)
    assert prefect.run["state_type"] == "COMPLETED"
    assert prefect.tasks(set(DIAMOND)) == dict.fromkeys(DIAMOND, "Ran")
    wait_until(lambda: {"digging", "met left", "met right", "100%s joined"} <= set(prefect.logs()))
    assert all(f"| {stage} | ran |" in prefect.page() for stage in DIAMOND)

    assert main(["left"]) == 0
    assert capsys.readouterr().out.startswith("Nothing changed: 2 stages are as they were (")
    assert Prefect(server).tasks({"dig", "left"}) == {"dig": "Unchanged", "left": "Unchanged"}

    assert main(["--force", "dig"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("1 stage, 1 ran.")


def test_a_failing_stage_fails_the_flow_its_siblings_finish_its_dependants_dont_start(
    tmp_path, server, monkeypatch, capsys
):
    slow = "import pathlib, time\nwhile not pathlib.Path('failed').exists(): time.sleep(0.02)\ntime.sleep(1)"
    broken = "import pathlib\nprint('looking')\npathlib.Path('failed').touch()\nraise SystemExit('no such [thing]')"
    stages = {"broken": ([], broken), "slow": ([], slow), "after": (["broken"], ""), "last": (["after", "slow"], "")}
    monkeypatch.chdir(repository(tmp_path, stages))
    assert main([]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "broken failed. Its last lines:"
    assert "    no such [thing]" in told
    assert "All that it said: .work/logs/broken.log" in told
    assert "no such [thing]" in Path(".work/logs/broken.log").read_text()
    assert "Not started, as they need it: after, last" in told
    assert told[-1].startswith("When that is mended: ")
    assert told[-1].endswith(" broken")
    prefect = Prefect(server)
    assert prefect.run["state_type"] == "FAILED"
    assert "no such [thing]" in prefect.run["state"]["message"]
    tasks = prefect.tasks({"broken", "slow"})
    assert (tasks["broken"], tasks["slow"]) == ("Failed", "Ran")
    assert not {tasks.get(stage) for stage in ("after", "last")} & {"Ran", "Failed", "Running"}
    assert Path("slow.out").exists()
    assert not Path("after.out").exists()
    page = prefect.page()
    assert "| after | not started |" in page
    assert "no such [thing]" in page


def test_elsewhere_is_one_line_before_any_server_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    told = capsys.readouterr().err
    assert "go to the repository's root" in told
    assert told.count("\n") == 1


@pytest.mark.acceptance
def test_a_server_that_does_not_answer_is_one_line(tmp_path):
    root = repository(tmp_path, DIAMOND)
    env = environment("http://127.0.0.1:9/api", tmp_path)
    ended = subprocess.run(command(), cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "prefect server start" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_interrupt_lets_the_trainer_save_and_leaves_nothing(tmp_path, server):
    root = repository(tmp_path / "toy", {"train": ([], TRAIN.format(slow=0.5))})
    with started_flow(root, tmp_path, server) as flow:
        pid = pid_in(root / "pid")
        flow.send_signal(signal.SIGINT)
        assert flow.wait(60) == 130
    assert not lives(pid)
    assert (root / "saved").read_text() == "whole"
    told = (root / "flow.log").read_text()
    assert "Traceback" not in told
    assert re.search(r"^\d\d:\d\d:\d\d \| train \| training$", told, re.M)  # one prefix: time and stage
    assert told.splitlines()[-1] == "Interrupted; what was finished is kept, and the next run goes on from there."


def test_a_cancel_is_looked_for_at_the_flows_own_server(server, monkeypatch):
    """It stands in the context of the flow's thread, which a new thread does not have by itself."""
    monkeypatch.setattr(cancelling, "ASK_SECONDS", 0.1)
    seen = []

    @flow
    def cancelled():
        context = FlowRunContext.get()
        with StageRunner() as runner, cancelling.heeding_cancellation(runner):
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(context.flow_run.id, Cancelling(), force=True)
            patience = time.monotonic() + 20
            while not runner.ending and time.monotonic() < patience:
                time.sleep(0.05)
            seen.append(runner.ending)

    cancelled(return_state=True)
    assert seen == [True]
    assert not SubprocessASGIServer._instances, "a server of the thread's own was started"


@contextlib.contextmanager
def started_flow(root: Path, home: Path, server: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The command, running; its words go to `flow.log`."""
    with (root / "flow.log").open("wb") as log:
        env = environment(server, home)
        flow = subprocess.Popen(command(), cwd=root, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield flow
    finally:
        flow.kill()
        flow.wait()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all flows that start a server of their own: making the database takes a while."""
    return tmp_path_factory.mktemp("home")


def all_below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.acceptance
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_end_of_the_flow_leaves_a_process_behind(tmp_path, home, number):
    """Its own server included; the trainer has time to save."""
    root = repository(tmp_path / "toy", {"train": ([], TRAIN.format(slow=3))})
    with started_flow(root, home) as flow:
        pid = pid_in(root / "pid")
        below = all_below(flow.pid)
        assert pid in {process.pid for process in below}
        assert len(below) >= 5  # two wardens, dvc, the trainer, the server
        os.killpg(flow.pid, number)  # as a terminal does
        assert flow.wait(60) != 0
        wait_until(lambda: not any(lives(process.pid) for process in below))
    assert (root / "saved").read_text() == "whole"
    (root / "train.py").write_text("open('train.out', 'w').write('short')")
    with started_flow(root, home) as again:
        assert again.wait(120) == 0


@pytest.mark.acceptance
def test_a_second_interrupt_ends_at_once(tmp_path, home):
    root = repository(tmp_path / "toy", {"train": ([], TRAIN.format(slow=50))})
    with started_flow(root, home) as flow:
        pid = pid_in(root / "pid")
        below = all_below(flow.pid)
        flow.send_signal(signal.SIGINT)
        wait_until(lambda: "| saving" in (root / "flow.log").read_text())
        asked = time.monotonic()
        flow.send_signal(signal.SIGINT)
        assert flow.wait(60) == 130
        assert time.monotonic() - asked < 20
        assert not lives(pid)
        wait_until(lambda: not any(lives(process.pid) for process in below))


@pytest.mark.acceptance
def test_interrupt_while_the_server_starts(tmp_path, home):
    root = repository(tmp_path / "toy", DIAMOND)
    with started_flow(root, home) as flow:
        wait_until(lambda: (root / ".work/prefect-server.log").exists() and all_below(flow.pid))
        below = all_below(flow.pid)
        flow.send_signal(signal.SIGINT)
        assert flow.wait(60) == 130
        wait_until(lambda: not any(lives(process.pid) for process in below))
    assert not (root / "dig.out").exists()


def result(stage: str, outcome: Outcome) -> StageResult:
    return StageResult(stage, outcome, int(outcome is Outcome.FAILED), 1.25, ("a line",))


def write_scores(root: Path) -> None:
    top1 = {"test_top1": 0.8612, "test_top1_low": 0.8543, "test_top1_high": 0.8678}
    top1 |= {"val_top1": 0.85, "val_top1_low": 0.84, "val_top1_high": 0.86}
    (root / "metrics").mkdir()
    (root / "metrics/knn.json").write_text(json.dumps({"trained": top1, "pixels": top1, "protocol": ""}))
    (root / "metrics/probe.json").write_text(json.dumps({"skipped": "no labels", "protocol": ""}))
    (root / "report").mkdir()
    (root / "report/index.html").touch()


def test_page_shows_scores_report_and_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path)
    plan = {"a": (), "b": ("a",)}
    results = {"a": result("a", Outcome.UNCHANGED), "b": result("b", Outcome.RESTORED)}
    page = markdown(plan, results, whole=True)
    assert "| Trained backbone | 86.1 (85.4-86.8) |" in page
    assert "| Untrained backbone |  |" in page
    assert "probe: left out, no labels" in page
    assert "Report: report/index.html" in page
    assert "| b | restored from cache | 1.2 |" in page
    assert last_words(plan, results, 3.2) == [
        "Done in 3 s: 2 stages, 1 unchanged, 1 restored from cache.",
        "Report: report/index.html",
    ]


@pytest.mark.parametrize(("outcome", "whole"), [(Outcome.FAILED, True), (Outcome.RAN, False)])
def test_page_shows_no_scores_that_may_be_an_earlier_runs(tmp_path, monkeypatch, outcome, whole):
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path)
    page = markdown({"a": ()}, {"a": result("a", outcome)}, whole=whole)
    assert "86.1" not in page
    assert ("a line" in page) == (outcome is Outcome.FAILED)


@pytest.mark.acceptance
def test_a_server_that_cannot_start_says_why_and_what_works_without(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file where a folder should be")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    with (
        pytest.raises(OSError, match=r"(?s)ended at once.*server\.log.*dvc repro"),
        local_server(tmp_path / "server.log"),
    ):
        raise AssertionError("it started")


def test_the_server_listens_on_this_machine_only(server):
    port = int(server.split(":")[2].split("/")[0])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}
