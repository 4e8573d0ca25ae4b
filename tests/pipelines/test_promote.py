"""What becomes champion of MLflow's model registry, and what does not, in words."""

from pathlib import Path
from typing import Any

import evidence
import pytest

from pipelines import promote

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own


def test_the_first_is_champion_and_the_same_is_registered_once(home: Path) -> None:
    evidence.lay(home)
    first = promote.consider(evidence.SETTINGS)
    assert first.moved and first.version == "1" and first.champion is None
    assert "k-NN on val 80.0 % (78.0-82.0), the first" in first.words
    again = promote.consider(evidence.SETTINGS)
    assert (again.moved, again.version, again.words) == (False, "1", "Version 1 is the champion already.")
    evidence.lay(home, key="k2", seed=1, knn=0.9)
    better = promote.consider(evidence.SETTINGS)
    assert better.moved and better.version == "2", better
    assert better.champion is not None
    assert (better.champion["knn/val_top1"], better.candidate["knn/val_top1"]) == (0.8, 0.9)
    evidence.lay(home, key="k3", seed=2, knn=0.91)
    close = promote.consider(evidence.SETTINGS)
    assert not close.moved and "may be luck" in close.words, close


def scored(val: float, half: float = 0.01, *, test: float = 0.5) -> dict[str, Any]:
    names = {"knn/val_top1": val, "knn/val_top1_low": val - half, "knn/val_top1_high": val + half}
    return names | {"knn/test_top1": test}


@pytest.mark.parametrize(
    ("candidate", "state", "moved", "why"),
    [
        (scored(0.83), "healthy", True, "against 80.0 %, ahead by 3.0 points and beyond the 95 % interval"),
        (scored(0.83), "warming up", True, "ahead"),
        (scored(0.83, 0.04), "healthy", False, "may be luck"),
        (scored(0.81, 0.001), "healthy", False, "ahead by 2 points (runtime.promote.margin)"),
        (scored(0.78, test=0.99), "healthy", False, "margin"),
        (scored(0.99), "uniform collapse", False, "went wrong (uniform collapse"),
        (scored(0.99), "", False, "no health state"),
        ({}, "healthy", False, "no k-NN on val"),
    ],
)
def test_val_beyond_margin_and_interval_decides(candidate: dict[str, float], state: str, moved: bool, why: str) -> None:
    found = promote.judge(candidate, scored(0.8), state=state, score="knn", margin=0.02)
    assert found[0] == moved and why in found[1], found


@pytest.mark.parametrize("switch", ["tracking", "promote"])
def test_switched_off_it_says_so_and_touches_nothing(home: Path, switch: str) -> None:
    runtime = evidence.SETTINGS["runtime"]
    off = {**evidence.SETTINGS, "runtime": {**runtime, switch: {**runtime[switch], "enabled": False}}}
    decision = promote.consider(off)  # nothing lies here
    assert not decision.moved and f"runtime.{switch}.enabled" in decision.words
