"""Laws of the verdict: what the sentence says follows from the intervals, whatever the evaluations."""

import json
from pathlib import Path

import pytest
from results_folder import KNN, NO_LABELS, PROBE

from pipelines.evaluation.scores import MORE_TRAINING, Evaluation, Score, Top1, Verdict, standing, verdict

HEALTHY = {"state": "healthy", "advice": "Nothing to do."}
SICK = {"state": "uniform collapse", "advice": "Lower the temperature."}


def at(test: float, low: float, high: float) -> Score:
    return Score(test=Top1(test, low, high), val=Top1(test, low, high))


def evaluation(name: str, trained: float, untrained: float, pixels: float, half: float = 0.01) -> Evaluation:
    values = {"pixels": pixels, "untrained": untrained, "trained": trained}
    return Evaluation(name, {kind: at(value, value - half, value + half) for kind, value in values.items()})


UNPIXELLED = Evaluation("linear evaluation", {"untrained": at(0.6, 0.59, 0.61), "trained": at(0.9, 0.89, 0.91)})


@pytest.mark.parametrize(
    ("trained", "baseline", "word"),
    [
        (at(0.9, 0.88, 0.92), at(0.8, 0.79, 0.81), "beats"),
        (at(0.9, 0.8101, 0.92), at(0.8, 0.79, 0.81), "beats"),
        (at(0.9, 0.81, 0.92), at(0.8, 0.79, 0.81), "is level with"),
        (at(0.7, 0.68, 0.79), at(0.8, 0.79, 0.81), "is level with"),
        (at(0.7, 0.68, 0.7899), at(0.8, 0.79, 0.81), "stays behind"),
    ],
)
def test_intervals_that_touch_are_level(trained: Score, baseline: Score, word: str):
    assert standing(trained, baseline) == word


@pytest.mark.parametrize(
    ("found", "health", "expected"),
    [
        (
            [evaluation("k-NN", 0.9, 0.6, 0.8), evaluation("probe", 0.9, 0.6, 0.8)], HEALTHY,
            Verdict("The trained backbone beats the untrained network and raw pixels, by k-NN and by probe; "
                    "training is healthy.", "good"),
        ),
        (
            [evaluation("k-NN", 0.9, 0.6, 0.8)], SICK,
            Verdict("The trained backbone beats the untrained network and raw pixels, by k-NN; "
                    "training is not healthy (uniform collapse).", "bad", "Lower the temperature."),
        ),
        (
            [evaluation("k-NN", 0.7, 0.6, 0.8), evaluation("probe", 0.9, 0.6, 0.8)], HEALTHY,
            Verdict("By k-NN the trained backbone beats the untrained network but stays behind raw pixels; "
                    "by probe it beats the untrained network and raw pixels; training is healthy.",
                    "mixed", MORE_TRAINING),
        ),
        (
            [evaluation("k-NN", 0.9, 0.6, 0.8), evaluation("probe", 0.9, 0.6, 0.8), UNPIXELLED], HEALTHY,
            Verdict("By k-NN and by probe the trained backbone beats the untrained network and raw pixels; "
                    "by linear evaluation it beats the untrained network; training is healthy.", "good"),
        ),
        (
            [evaluation("k-NN", 0.601, 0.6, 0.8)], HEALTHY,
            Verdict("The trained backbone is level with the untrained network but stays behind raw pixels, by k-NN; "
                    "training is healthy.", "bad", MORE_TRAINING),
        ),
        (
            [Evaluation("k-NN", skipped="no labels")], HEALTHY,
            Verdict("Without labels the trained backbone has no score; training is healthy.", "open"),
        ),
        (
            [Evaluation("k-NN", skipped="no labels")], SICK,
            Verdict("Without labels the trained backbone has no score; training is not healthy (uniform collapse).",
                    "bad", "Lower the temperature."),
        ),
    ],
)  # fmt: skip
def test_the_sentence(found: list[Evaluation], health: dict[str, str], expected: Verdict):
    assert verdict(found, health) == expected


def test_files_are_read_with_their_settings_in_order(tmp_path: Path):
    path = tmp_path / "probe.json"
    shares = {"10": 0.4, "0.01": 0.8, "0.001": 0.81, "3.0": 0.5}
    by_lr = {lr: {"top1": share, "top1_low": share - 0.1, "top1_high": share + 0.1} for lr, share in shares.items()}
    values = {**PROBE["trained"], "lr": 0.001, "damping": 0.1, "val_by_lr": by_lr, "diverged": ["lr 30 damping 1"]}
    path.write_text(json.dumps({"trained": values, "protocol": "stored features"}))
    found = Evaluation.read("probe", path)
    assert found.protocol == "stored features" and list(found.scores) == ["trained"]
    score = found.scores["trained"]
    for split, found_there in (("test", score.test), ("val", score.val)):
        assert found_there == tuple(PROBE["trained"][f"{split}_top1{end}"] for end in ("", "_low", "_high"))
    assert score.chosen == "damping = 0.1, lr = 0.001" and score.diverged == ["lr 30 damping 1"]
    by_setting = {"lr = 0.001": "0.001", "lr = 0.01": "0.01", "lr = 3": "3.0", "lr = 10": "10"}
    assert list(score.val_by_setting) == list(by_setting)
    for name, lr in by_setting.items():
        assert score.val_by_setting[name] == tuple(by_lr[lr].values())
    assert str(score.test) == "88.2 (87.1-89.3)"
    assert found.settings == list(score.val_by_setting)


def test_what_was_left_out_says_why(tmp_path: Path):
    path = tmp_path / "knn.json"
    assert Evaluation.read("k-NN", path).skipped == "not evaluated yet"
    path.write_text(json.dumps(NO_LABELS))
    found = Evaluation.read("k-NN", path)
    assert found.skipped == NO_LABELS["skipped"] and not found.scores


def test_kinds_come_in_one_order_whatever_the_file(tmp_path: Path):
    path = tmp_path / "knn.json"
    path.write_text(json.dumps({kind: KNN[kind] for kind in ("trained", "pixels", "untrained")}))
    assert list(Evaluation.read("k-NN", path).scores) == ["pixels", "untrained", "trained"]
