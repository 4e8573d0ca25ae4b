import json
import shutil
from pathlib import Path
from typing import Any

import evidence
import mlflow_witness as witness
import pytest
import yaml

from pipelines import paths, sync
from pipelines.rows import row, tracking, workspace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an import alone can take longer than a stage would wait."""
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 120.0)


VOLATILE = ("host", "platform", "versions.", "mlflow.source", "mlflow.user", "git.", "dino.rebuilt", "dino.model_id",
            "seconds/")  # fmt: skip


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.startswith(VOLATILE)}


def pipeline() -> None:
    """The stages' calls, over files that are there already."""
    with tracking.pretraining(evidence.SETTINGS, "k1", resolved=evidence.RESOLVED) as tracker:
        for step, values in evidence.curve_points():  # as the trainer's points are, with their own step inside
            tracker.log_curve_points([(step, {"step": step, **values})])
    points = evidence.snapshot_points()
    tracking.evaluation("k1", "select", evidence.selected(), points=points, params=evidence.SETTINGS)
    tracking.evaluation("k1", "knn", evidence.scores(0.8), params=evidence.SETTINGS)
    tracking.evaluation("k1", "probe", evidence.scores(0.82), params=evidence.SETTINGS)
    tracking.report("k1", pages=["report/index.html"], params=evidence.SETTINGS)


def test_a_row_that_the_pipeline_wrote_is_complete_and_a_colleague_who_pulled_sees_the_same(
    home: Path, empty_database: Path
) -> None:
    evidence.lay(home)
    pipeline()
    before = witness.everything(home)
    (mine,) = witness.runs(home)
    colleague = home.parent / "colleague"
    shutil.copytree(home, colleague, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", ".work"))
    shutil.copy(empty_database, colleague / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(colleague)
        sync.sync(evidence.SETTINGS)
    (theirs,) = witness.runs(colleague)
    assert theirs.info.run_name == mine.info.run_name
    assert theirs.info.status == "FINISHED"
    assert theirs.data.params == mine.data.params
    assert lasting(theirs.data.metrics) == lasting(mine.data.metrics)
    assert lasting(theirs.data.tags) == lasting(mine.data.tags)
    assert [d.dataset.digest for d in theirs.inputs.dataset_inputs] == [
        d.dataset.digest for d in mine.inputs.dataset_inputs
    ]
    assert witness.curve(colleague, "loss") == witness.curve(home, "loss")
    assert "Teacher: epoch 5. No later checkpoint is worse." in mine.data.tags["mlflow.note.content"]
    assert witness.curve(home, "snapshot/val_top1") == [(60, 0.7), (80, 0.7)]
    assert witness.curve(colleague, "snapshot/val_top1") == witness.curve(home, "snapshot/val_top1")
    assert (colleague / "mlartifacts" / theirs.info.run_id / "artifacts/report/index.html").is_file()

    sync.sync(evidence.SETTINGS)
    after = witness.everything(home)
    assert {name for name in before if before[name] != after[name]} <= {"tags"}
    assert set(before["tags"]) <= set(after["tags"])


def test_twice_is_once(home: Path) -> None:
    evidence.lay(home)
    sync.sync(evidence.SETTINGS)
    once = witness.everything(home)
    sync.sync(evidence.SETTINGS)
    assert witness.everything(home) == once


def test_settings_are_the_same_from_params_and_from_the_lock(home: Path) -> None:
    evidence.lay(home)
    assert "1e-05" in Path("dvc.lock").read_text()
    found = workspace.gather(evidence.SETTINGS).evaluation
    assert found and found.digest == row.evaluation_digest(evidence.SETTINGS)
    assert found.params == row.evaluation_params(evidence.SETTINGS)


def test_edits_of_params_after_the_run_are_not_taken_for_its_settings(home: Path) -> None:
    evidence.lay(home)
    edited = json.loads(json.dumps(evidence.SETTINGS))
    edited["knn"]["temperature"], edited["data"]["seed"], edited["pretrain"]["epochs"] = 9.0, 7, 99
    sync.sync(edited)
    (run,) = witness.runs(home)
    assert (run.data.params["knn.temperature"], run.data.params["data.seed"]) == ("0.07", "0")
    assert run.data.params["pretrain.epochs"] == str(evidence.RESOLVED["epochs"])


def test_results_of_another_teacher_are_left_out(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence.lay(home, key="k1")
    metrics = {p: p.read_bytes() for p in (paths.PRETRAIN_METRICS, paths.PRETRAIN_CURVES, paths.KNN_METRICS)}
    lock = workspace.LOCK.read_bytes()
    evidence.lay(
        home, key="k2", seed=1
    )  # `git pull` brought new JSON files and dvc.lock, nobody ran `dvc checkout` ...
    for path, content in metrics.items():
        path.write_bytes(content)
    workspace.LOCK.write_bytes(lock)  # ... here the other way round: new teacher, old files
    sync.sync(evidence.SETTINGS)
    (run,) = witness.runs(home)
    assert run.data.tags["dino.key"] == "k2"
    assert not [name for name in run.data.metrics if not name.startswith("seconds")]
    assert not [name for name in run.data.params if name.startswith(("knn", "probe", "embed"))]
    told = capsys.readouterr().err
    assert "is not the one that dvc.lock holds" in told and "metrics/pretrain.json" in told


def test_the_linear_evaluation_is_in_the_row_as_it_reads_the_teacher_itself(home: Path) -> None:
    evidence.lay(home)
    found = workspace.gather(evidence.SETTINGS)
    assert not found.left_out and found.evaluation
    assert found.evaluation.summaries["linear/test_top1"] == 0.84
    lock = yaml.safe_load(workspace.LOCK.read_text())
    lock["stages"]["linear"]["deps"][0]["md5"] = "0" * 32
    workspace.LOCK.write_text(yaml.safe_dump(lock))
    (why,) = workspace.gather(evidence.SETTINGS).left_out
    assert "metrics/linear.json: it is of another teacher; `dvc repro linear`" in why


@pytest.mark.parametrize("broken", ["features", "edited"])
def test_an_evaluation_that_the_lock_does_not_tie_to_the_teacher_is_left_out(
    home: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    evidence.lay(home)
    if broken == "edited":
        paths.KNN_METRICS.write_text(json.dumps(evidence.scores(0.99)))
    else:
        lock = yaml.safe_load(workspace.LOCK.read_text())
        lock["stages"]["knn"]["deps"][0]["md5"] = "0" * 32 + ".dir"
        workspace.LOCK.write_text(yaml.safe_dump(lock))
    sync.sync(evidence.SETTINGS)
    (run,) = witness.runs(home)
    assert "knn/test_top1" not in run.data.metrics
    assert run.data.metrics["probe/test_top1"] == 0.82
    assert "dvc repro knn" in capsys.readouterr().err


def test_without_a_teacher_the_command_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence.lay(home)
    monkeypatch.setattr("sys.argv", ["sync"])
    paths.TEACHER.unlink()
    assert sync.main() == 1
    assert capsys.readouterr().err == (
        "sync: models/teacher.safetensors is missing; `dvc repro select` makes it, `dvc pull` fetches it\n"
    )
    paths.TEACHER.write_bytes(b"cut")
    assert sync.main() == 1
    assert "is not a whole safetensors file" in capsys.readouterr().err
