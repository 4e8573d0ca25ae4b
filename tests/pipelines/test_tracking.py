import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evidence
import mlflow_witness as witness
import pytest
from faulty_disks import full_disk

from pipelines import paths
from pipelines.rows import tracking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an import alone can take longer than a stage would wait."""
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 120.0)


def train(points: list[Any], *, key: str = "k1", settings: dict[str, Any] = evidence.SETTINGS) -> None:
    with tracking.pretraining(settings, key, resolved=evidence.RESOLVED) as tracker:
        for point in points:
            tracker.log_curve_points([point])


def the_run(home: Path) -> Any:
    (run,) = witness.runs(home)
    return run


# The JSON file


def test_metrics_depend_on_the_values_only(tmp_path: Path) -> None:
    tracking.write_metrics(tmp_path / "new/folder/a.json", {"b": 0.1 + 0.2, "a": {"z": 1, "é": None}})
    tracking.write_metrics(tmp_path / "b.json", {"a": {"é": None, "z": 1}, "b": 0.1 + 0.2})
    text = (tmp_path / "new/folder/a.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": {\n    "z": 1,\n    "é": null\n  },\n  "b": 0.30000000000000004\n}\n'
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_no_metric_is_written_that_is_not_a_number(tmp_path: Path, broken: float) -> None:
    path = tmp_path / "knn.json"
    tracking.write_metrics(path, {"trained": 1.0})
    with pytest.raises(ValueError, match=r"knn\.json: trained\.val_by_k\.1 is not a finite number"):
        tracking.write_metrics(path, {"trained": {"val_by_k": [1.0, broken]}})
    assert json.loads(path.read_text()) == {"trained": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["knn.json"]


# What a stage pays


def test_mlflow_is_imported_only_where_a_row_is_written_and_sends_nothing_home(creation: witness.Creation) -> None:
    assert creation.said.read_text().startswith("imports mlflow: False\nsends something home: False\n")


def test_a_broken_lock_file_ends_no_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dvc.lock").write_text("<<<<<<< HEAD\n a: [1\n=======\n")
    train(evidence.curve_points())
    assert [step for step, _ in witness.curve(home, "loss")] == list(evidence.STEPS)
    assert "dvc.lock cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("metrics/pretrain.json", "[1]"),
        ("metrics/data.json", "{"),
        ("dvc.lock", "stages: [1]"),
        ("dvc.lock", "stages: {a: {outs: [5]}}"),
        ("plots/pretrain.csv", "step,loss\nx,y\n"),
    ],
)
def test_damaged_files_of_results_end_no_training(path: str, text: str, home: Path) -> None:
    evidence.lay(home)
    Path(path).write_text(text)
    train(evidence.curve_points())
    assert [step for step, _ in witness.curve(home, "loss")] == list(evidence.STEPS)


@pytest.mark.usefixtures("impatient")
def test_a_database_without_room_fails_no_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines import sync

    evidence.lay(home)
    assert witness.runs(home) == []  # makes the experiment
    database = home / "mlflow.db"
    with full_disk(home / "disk", database.stat().st_size + (1 << 20)) as disk:
        shutil.move(database, disk / "mlflow.db")
        ballast = (disk / "ballast").open("wb", buffering=0)
        with contextlib.suppress(OSError), ballast:
            while True:
                ballast.write(bytes(4096))
        settings = witness.with_uri(f"sqlite:///{disk}/mlflow.db")
        with tracking.pretraining(settings, "k1", resolved=evidence.RESOLVED) as tracker:
            tracker.log_curve_points(evidence.curve_points())
        told = capsys.readouterr().err
        assert told.count("`python -m pipelines.sync`") == 1, told
        assert "database or disk is full" in told or "no answer within" in told, told  # a busy machine is slower
        assert witness.curve(disk, "loss") == []
        (disk / "ballast").unlink()
        sync.sync(evidence.SETTINGS | settings)
        assert witness.curve(disk, "loss") == [(step, values["loss"]) for step, values in evidence.curve_points()]


@pytest.mark.parametrize("off", ["rank", "params"])
def test_only_the_first_rank_writes_and_only_if_params_say_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    settings = evidence.SETTINGS
    if off == "rank":
        monkeypatch.setenv("RANK", "1")
    else:
        tracked = {**settings["runtime"]["tracking"], "enabled": False}
        settings = {**settings, "runtime": {**settings["runtime"], "tracking": tracked}}
    before = witness.everything(home)
    train(evidence.curve_points(), settings=settings)
    assert witness.everything(home) == before


# One key, one row


def test_a_row_says_what_was_trained_on_what(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "longer")
    monkeypatch.setenv("DINO_FLOW_RUN_ID", "f1")
    evidence.lay(home)
    train(evidence.curve_points())
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS)
    tracking.evaluation("k1", "probe", evidence.scores(0.82), params=evidence.SETTINGS)
    Path("report/scores.png").write_bytes(evidence.PNG)
    tracking.report("k1", pages=["report/index.html"], pictures=["report/scores.png"], params=evidence.SETTINGS)

    run = the_run(home)
    assert run.info.run_name == "vit_tiny/4 64x3 5 epochs (longer)"
    assert run.data.params["pretrain.precision"] == "fp32"  # as the checkpoint has it, not "auto"
    assert run.data.params["probe.lrs"] == "[1e-05, 0.1, 1.0]"
    assert run.data.params["data.folder"] == "data/raw/digits"
    assert run.data.metrics["knn/test_top1"] == 0.8
    assert run.data.metrics["probe/untrained/test_top1_high"] == pytest.approx(0.73)
    assert not [name for name in run.data.metrics if "_by_" in name or "T-shirt" in name]
    assert run.data.tags["dvc.models/teacher.safetensors"] == tracking.workspace.file_md5(home / paths.TEACHER)
    assert run.data.tags["health"] == run.data.tags["pretrain.health.state"] == "healthy"
    assert (run.data.tags["dvc.exp_name"], run.data.tags["prefect.flow_run_id"]) == ("longer", "f1")
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("The trained backbone beats the untrained network but stays behind raw pixels")
    assert "| k-NN (k 10)&emsp; | 0.8000 (0.7900 to 0.8100)&emsp; |" in note
    assert "Registered as [dino, version 1](#/models/dino/versions/1)." in note
    assert f"![Scores](get-artifact?path=report/scores.png&run_uuid={run.info.run_id})" in note
    md5s = {d.dataset.name: d.dataset.digest for d in run.inputs.dataset_inputs}
    assert md5s["digits/train"] == tracking.workspace.file_md5(home / paths.TRAIN_IMAGES)
    (train_input,) = [d for d in run.inputs.dataset_inputs if d.dataset.name == "digits/train"]
    import mlflow

    source = mlflow.data.get_source(train_input)
    assert source.load() == paths.TRAIN_IMAGES
    paths.TRAIN_IMAGES.write_bytes(b"another version")
    with pytest.raises(FileNotFoundError, match=r"dvc pull data/prepared/train\.arrow"):
        source.load()
    assert len(run.outputs.model_outputs) == 1
    artifacts = home / "mlartifacts" / run.info.run_id / "artifacts"
    shown = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*.*") if path.is_file()}
    assert {"pictures/crops.png", "report/index.html", "metrics/knn.json"} <= shown


def test_the_columns_that_the_ui_opens_with_exist(home: Path) -> None:
    evidence.lay(home)
    with tracking.pretraining(evidence.SETTINGS, "k1", resolved=evidence.RESOLVED) as tracker:
        tracker.log_curve_points([(20, {"images_per_second": 1000.0})])
        tracker.tag({"dvc.exp_name": "longer"})
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS)
    for stage in ("probe", "linear"):
        tracking.evaluation("k1", stage, evidence.scores(0.82), params=evidence.SETTINGS)
    run = the_run(home)
    for column in tracking_columns():
        kind, _, name = column.partition(".")
        held = {"metrics": run.data.metrics, "tags": run.data.tags, "params": run.data.params}.get(kind)
        assert held is None or name.strip("`") in held, column


def tracking_columns() -> Iterator[str]:
    from pipelines.rows import view

    yield from view.COLUMNS


def test_resuming_finds_the_row_and_logs_no_step_twice(home: Path) -> None:
    points = evidence.curve_points()
    train(points[:3])
    train(points[1:])  # as after a kill: the last saved state was older than the last point
    run = the_run(home)
    assert witness.curve(home, "loss") == [(step, values["loss"]) for step, values in points]
    assert run.info.status == "FINISHED"


def test_another_key_is_another_row(home: Path) -> None:
    train(evidence.curve_points()[:1], key="k1")
    train(evidence.curve_points()[:1], key="k2")
    assert [run.data.tags["dino.key"] for run in witness.runs(home)] == ["k1", "k2"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("diverged"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")],
)
def test_a_row_ends_as_its_training_did(home: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.pretraining(evidence.SETTINGS, "k1") as tracker:
        looked = threading.Event()
        seen: list[str] = []
        tracker.submit(lambda r: (r.refresh(), seen.append(r.status), looked.set()))
        assert looked.wait(60)
        raise error
    assert seen == ["RUNNING"]
    assert the_run(home).info.status == status
    train([])
    assert the_run(home).info.status == "FINISHED"


def test_seconds_of_resumed_sessions_add_up(home: Path) -> None:
    for _ in range(2):
        with tracking.pretraining(evidence.SETTINGS, "k1"):
            time.sleep(0.3)
    assert 0.6 <= the_run(home).data.metrics["seconds/pretrain"] < 10


# Evaluations


def test_other_evaluation_settings_are_a_row_below_and_old_ones_come_home(home: Path) -> None:
    evidence.lay(home)
    train([])
    warmer = {**evidence.SETTINGS, "knn": {**evidence.SETTINGS["knn"], "temperature": 0.1}}
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS)
    tracking.evaluation("k1", "knn", evidence.scores(0.7), params=warmer)
    tracking.evaluation("k1", "knn", evidence.scores(0.7), params=warmer)
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS)
    parent, child = witness.runs(home)
    assert (parent.data.metrics["knn/test_top1"], child.data.metrics["knn/test_top1"]) == (0.8, 0.7)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.run_name == "knn.temperature=0.1"
    assert child.data.params == {**parent.data.params, "knn.temperature": "0.1"}
    assert child.info.status == "FINISHED"


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_an_evaluation_leaves_the_status_of_its_row_alone(home: Path, status: str) -> None:
    train([])
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{home}/mlflow.db").update_run(the_run(home).info.run_id, status=status)
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS)
    assert the_run(home).info.status == status


def test_an_evaluation_that_cannot_be_a_result_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="trained is not a finite number"):
        tracking.evaluation("k1", "knn", {"trained": float("nan")}, params=evidence.SETTINGS)


def test_two_processes_at_once_make_one_database(creation: witness.Creation) -> None:
    assert len(creation.said.read_text().splitlines()) == 2  # neither complains


def test_two_processes_at_once_make_one_row_whose_curves_are_not_doubled(home: Path) -> None:
    evidence.lay(home)
    script = """
        import os, sys
        import evidence
        from pipelines.rows import mlflow_store, tracking
        tracking.CLOSE_SECONDS = 120.0
        other = os.fork()
        stage = "knn" if other else "probe"
        tracking.evaluation("k1", stage, evidence.scores(0.8), params=evidence.SETTINGS)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0)
    """
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}"}
    both = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=home, env=env, stderr=subprocess.PIPE)
    assert (both.returncode, both.stderr.decode()) == (0, "")
    run = the_run(home)
    assert {"knn/test_top1", "probe/test_top1"} <= set(run.data.metrics)
    assert witness.curve(home, "loss") == [(step, values["loss"]) for step, values in evidence.curve_points()]
    assert "| probe" in run.data.tags["mlflow.note.content"] and "| k-NN" in run.data.tags["mlflow.note.content"]


# A server that is away


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of tens of them."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "GATHER_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 5.0)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.3)


@pytest.fixture(params=["refuses", "hangs"])
def absent_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server that is not there, or accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            listener.listen()
        yield f"http://somebody:secret@127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("impatient")
def test_a_training_neither_fails_nor_waits_for_a_server_that_is_away(
    home: Path, absent_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.rows import mlflow_store  # noqa: F401

    settings = witness.with_uri(absent_server)
    with tracking.pretraining(settings, "k1") as tracker:
        time.sleep(1.5)  # let the thread try; mlflow itself is imported above
        started = time.monotonic()
        for step in range(1000):
            tracker.log_curve_points([(step, {"loss": 1.0})])
        assert time.monotonic() - started < 0.5
        ended = time.monotonic()
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS | settings)
    assert time.monotonic() - ended < 30  # mlflow's own patience is 20 minutes
    assert json.loads(paths.KNN_METRICS.read_text()) == evidence.scores(0.8)
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 2, told  # one line each from pretrain and from knn, which are two processes in a pipeline
    assert all("`python -m pipelines.sync`" in line and "secret" not in line for line in told), told


@pytest.mark.acceptance  # a real server takes 15 s; by default a full disk is mended by sync
@pytest.mark.usefixtures("impatient")
def test_what_a_lost_server_missed_comes_by_sync_and_nothing_twice(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines import sync

    evidence.lay(home)
    points = evidence.curve_points()
    assert witness.runs(home) == []  # makes the experiment, whose pictures then lie beside the database
    with (
        witness.mlflow_server(home) as (address, server),
        tracking.pretraining(witness.with_uri(address), "k1", resolved=evidence.RESOLVED) as tracker,
    ):
        tracker.log_curve_points(points[:2])
        patience = time.monotonic() + 60
        while len(witness.curve(home, "loss")) < 2 and time.monotonic() < patience:
            time.sleep(0.1)
        witness.kill(server)
        tracker.log_curve_points(points[2:])
    assert [step for step, _ in witness.curve(home, "loss")] == [20, 40]
    assert the_run(home).info.status == "RUNNING"
    assert capsys.readouterr().err.count("`python -m pipelines.sync`") == 1

    sync.sync(evidence.SETTINGS)
    assert witness.curve(home, "loss") == [(step, values["loss"]) for step, values in points]
    assert the_run(home).info.status == "FINISHED"


@pytest.mark.acceptance
@pytest.mark.usefixtures("impatient")
def test_a_server_that_comes_back_gets_what_it_missed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = evidence.curve_points()
    assert witness.runs(home) == []  # makes the experiment, whose pictures then lie beside the database
    with (
        witness.mlflow_server(home) as (address, server),
        tracking.pretraining(witness.with_uri(address), "k1", resolved=evidence.RESOLVED) as tracker,
    ):
        tracker.log_curve_points(points[:2])
        patience = time.monotonic() + 60
        while len(witness.curve(home, "loss")) < 2 and time.monotonic() < patience:
            time.sleep(0.1)
        witness.kill(server)
        tracker.log_curve_points(points[2:3])
        time.sleep(3)
        with witness.mlflow_server(home, int(address.rpartition(":")[2])):
            tracker.log_curve_points(points[3:])
            while len(witness.curve(home, "loss")) < 4 and time.monotonic() < patience + 60:
                time.sleep(0.1)
            tracker.close()
            assert witness.curve(home, "loss") == [(step, values["loss"]) for step, values in points]
    assert "MLflow answers again" in capsys.readouterr().err


def test_a_locked_database_delays_no_training(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sqlite3

    train([])
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    blocker = sqlite3.connect(home / "mlflow.db", isolation_level=None)
    blocker.execute("begin exclusive")
    started = time.monotonic()
    try:
        with tracking.pretraining(evidence.SETTINGS, "k1") as tracker:
            tracker.log_curve_points(evidence.curve_points())
    finally:
        blocker.execute("rollback")
        blocker.close()
    assert time.monotonic() - started < 15  # mlflow's own patience is 20 s a call
    assert "is not up to date" in (said := capsys.readouterr().err) and "pipelines.sync" in said


@pytest.mark.acceptance  # MLflow itself waits 20 s for a lock
def test_curves_arrive_when_a_locked_database_is_free_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sqlite3

    train([])
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    with tracking.pretraining(evidence.SETTINGS, "k1") as tracker:
        blocker = sqlite3.connect(home / "mlflow.db", isolation_level=None)
        blocker.execute("begin exclusive")
        tracker.log_curve_points(evidence.curve_points())
        patience = time.monotonic() + 60
        while "is not up to date" not in capsys.readouterr().err and time.monotonic() < patience:
            time.sleep(0.1)
        blocker.execute("rollback")
        blocker.close()
    assert time.monotonic() < patience
    assert witness.curve(home, "loss") == [(step, values["loss"]) for step, values in evidence.curve_points()]


# Words


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:pw@host:5000/a", "http://host:5000/a"),
        ("postgresql://u:p@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_no_password_is_shown(uri: str, shown: str) -> None:
    assert tracking.without_secrets(uri) == shown
