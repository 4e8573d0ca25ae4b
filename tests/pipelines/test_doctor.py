"""What the collapse doctor says while a training runs, and where its word ends up."""

import os
import pty
import re
import shutil
import threading

import mlflow_witness as witness
import pytest
import yaml
from test_pretrain_stage import PROJECT, Workplace

from dino.config import PretrainConfig
from dino.health import WINDOW, Yardstick
from pipelines.rows import tracking
from pipelines.rows.view import COLUMNS
from pipelines.training.doctor import Doctor, facts, yardstick_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own

YARDSTICK = Yardstick(prototypes=64, batch=32, width=32, epochs=10, warmup_epochs=1)
WELL = {"loss": 3.0, "kl": 0.5, "teacher_entropy": 2.0, "batch_entropy": 3.0, "information": 1.0, "feature_std": 0.1,
        "rank_me": 15.0, "grad_norm": 1.0}  # fmt: skip
UNIFORM = {"information": 0.0, "batch_entropy": 4.15, "loss": 4.16}
ONE_HOT = {"information": 0.0, "batch_entropy": 0.01, "loss": 0.01}


def attend(*changes: dict[str, float], first: int = 0) -> tuple[list[str], list[str]]:
    """What is said and tagged at a curve with a point each tenth of an epoch, of which the first ones are past."""
    said: list[str] = []
    tagged: list[str] = []
    points = [WELL | {"epoch": (i + 1) / 10} | change for i, change in enumerate(changes)]
    doctor = Doctor(YARDSTICK, points[:first], said.append, tagged.append)
    for point in points[first:]:
        doctor.look(point)
    return said, tagged


def test_an_alarm_is_said_once_and_the_recovery_once() -> None:
    said, tagged = attend(*[{}] * 20, *[UNIFORM] * 20, *[{}] * 20)
    alarm, recovery = said
    assert alarm.startswith("ALARM: uniform collapse since epoch 2.3. The teacher gives every image the same answer")
    assert "1.000 of ln K = 4.16" not in alarm and "0.998 of ln K = 4.16" in alarm and "healthy: above 0.02" in alarm
    assert "pretrain.teacher_temp" in alarm and alarm.endswith("See docs/health.md.")
    assert recovery.startswith("recovered: healthy since epoch 4.3 (before: uniform collapse since epoch 2.3).")
    assert tagged == ["warming up", "healthy", "uniform collapse", "healthy"]


def test_an_odd_point_is_not_worth_a_word() -> None:
    assert attend(*([{}] * 10 + [UNIFORM] + [{}] * 10 + [ONE_HOT] * 2 + [{}] * 10))[0] == []


def test_another_bad_state_is_said_too() -> None:
    said, _ = attend(*[{}] * 12, *[UNIFORM] * 9, *[ONE_HOT] * 9)
    assert [line.partition(" since")[0] for line in said] == ["ALARM: uniform collapse", "ALARM: one-hot collapse"]


def test_a_resumed_training_hears_of_its_state_again() -> None:
    said, _ = attend(*[{}] * 12, *[UNIFORM] * 12, first=20)
    assert len(said) == 1 and said[0].startswith("ALARM: uniform collapse since epoch 1.5.")


def test_the_page_it_names_is_there_and_explains_every_state() -> None:
    said, _ = attend(*[UNIFORM] * 12)
    page = PROJECT / said[0].rpartition("See ")[2].rstrip(".")
    text = page.read_text()
    for word in ("warming up", "healthy", "uniform collapse", "one-hot collapse", "dimensional collapse", "diverging"):
        assert word in text.lower()


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory, creation: witness.Creation) -> tuple[Workplace, str, str]:
    """A real run of the stage that collapses, on a terminal, with an MLflow row; its output and its terminal's."""
    place = Workplace(tmp_path_factory.mktemp("collapsed"), save_steps=1000, teacher_temp_start=1.0, teacher_temp=1.0)
    params = yaml.safe_load((place.root / "params.yaml").read_text())
    params["runtime"]["tracking"]["enabled"] = True
    (place.root / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copy(creation.path, place.root / "mlflow.db")
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 65536):
                seen.append(part)
        except OSError:  # the terminal's other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w", buffering=1) as terminal:
        for name, value in {"TERM": "xterm", "COLUMNS": "160"}.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(tracking, "CLOSE_SECONDS", 120.0)
        code, out, _ = place.run_here(terminal)
    reader.join()
    os.close(ours)
    words = b"".join(seen).decode()
    assert code == 0, out + words
    return place, out, words


def test_a_collapse_is_told_once_while_training_and_at_the_end(collapsed: tuple[Workplace, str, str]) -> None:
    _, out, terminal = collapsed
    (alarm,) = re.findall(r"pretrain: ALARM: .* See docs/health\.md\.", " ".join(terminal.split()))  # above the bar
    assert "uniform collapse since epoch" in alarm and "pretrain.teacher_temp" in alarm
    assert re.search(r"loss \d\.\d+, uniform collapse", terminal)
    assert re.search("^pretrain: uniform collapse since epoch .*pretrain.teacher_temp", out, re.MULTILINE)


def test_a_collapse_stands_in_the_metrics_file(collapsed: tuple[Workplace, str, str]) -> None:
    place, _, _ = collapsed
    health = place.metrics()["health"]
    assert health["state"] == "uniform collapse" and "pretrain.teacher_temp" in health["advice"]
    assert 0 < health["since_epoch"] < 2
    assert health["information"] < health["healthy_above"]["information"] == 0.02
    assert {"loss", "kl", "teacher_entropy", "feature_std", "rank_me", "grad_norm", "finding"} <= set(health)


def test_mlflow_finds_the_run_by_its_health_and_has_a_point_at_each_epoch(
    collapsed: tuple[Workplace, str, str],
) -> None:
    place, _, _ = collapsed
    (run,) = witness.runs(place.root, "tags.health = 'uniform collapse'")
    assert run.data.tags["health"] == "uniform collapse"
    assert witness.runs(place.root, "tags.health = 'healthy'") == []
    steps = [step for step, _ in witness.curve(place.root, "information")]
    assert {40, 80} <= set(steps) and len(steps) == len(set(steps))  # the ends of both epochs


def test_the_numbers_are_those_of_the_last_points() -> None:
    points = [WELL | {"epoch": 2 + i / 10, "rank_me": float(i)} for i in range(WINDOW)]
    doctor = Doctor(YARDSTICK, points[:-1], print, print)
    assert facts(doctor.look(points[-1]), YARDSTICK)["rank_me"] == 2.0


def test_the_yardstick_is_the_trainings_own() -> None:
    config = PretrainConfig(batch=32, out_dim=64, epochs=10, warmup_epochs=1)
    assert yardstick_of(config, {"embed_dim": 32, "family": "vit"}) == YARDSTICK


def test_the_run_list_has_a_column_for_it() -> None:
    assert "tags.`health`" in COLUMNS
