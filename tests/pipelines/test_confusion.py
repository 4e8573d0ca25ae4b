"""Laws of the confusion matrix."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pipelines import paths
from pipelines.evaluation.confusion import Confusion


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    paths.KNN_PREDICTIONS.parent.mkdir()
    return tmp_path


def write(pairs: list[tuple[str, str]]) -> None:
    with paths.KNN_PREDICTIONS.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("actual", "predicted"), *pairs])


def test_it_counts_as_a_loop_counts(here: Path):
    rng = np.random.default_rng(0)
    names = ["nan", "10", "a,b", "NA"]  # hostile, and not in the order of the alphabet
    pairs = [(names[a], names[b]) for a, b in rng.integers(0, 4, (200, 2))]
    write(pairs)
    found = Confusion.read(names)
    assert found is not None and found.names == names
    for row, actual in enumerate(names):
        total = sum(pair[0] == actual for pair in pairs)
        for column, predicted in enumerate(names):
            count = sum(pair == (actual, predicted) for pair in pairs)
            assert found.counts[row, column] == count
            assert found.shares[row, column] == pytest.approx(count / total)


def test_worst_errors_by_share_of_their_class_not_by_count(here: Path):
    write([("a", "a")] * 90 + [("a", "b")] * 10 + [("b", "b")] * 3 + [("b", "a")] * 2 + [("c", "c")])
    found = Confusion.read(["a", "b", "c"])
    assert found is not None
    assert found.worst(9) == [("b", "a", 2, 5, 0.4), ("a", "b", 10, 100, 0.1)]
    assert found.worst(1) == [("b", "a", 2, 5, 0.4)]


def test_classes_that_do_not_occur_are_left_out_and_unknown_ones_kept(here: Path):
    write([("z", "x"), ("x", "x")])
    found = Confusion.read(["x", "unused"])
    assert found is not None and found.names == ["x", "z"]
    assert found.counts.tolist() == [[1, 0], [1, 0]]


def test_a_class_only_predicted_has_no_shares(here: Path):
    write([("a", "b")])
    found = Confusion.read(["a", "b"])
    assert found is not None and found.shares.tolist() == [[0, 1], [0, 0]]


def test_no_predictions_no_matrix(here: Path):
    assert Confusion.read(["a"]) is None
    write([])
    assert Confusion.read(["a"]) is None
