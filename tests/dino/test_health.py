"""The collapse doctor on made curves: states by their definitions, and what one odd point may change."""

import math
import random
import re

import pytest

from dino.config import FIELD_NAMES
from dino.health import (
    DIMENSIONAL,
    DIVERGING,
    HEALTHY,
    ONE_HOT,
    UNIFORM,
    WARMING_UP,
    WINDOW,
    State,
    Yardstick,
    diagnose,
    states,
)

K, TOP = 1024, math.log(1024)
WELL = {
    "loss": 5.0,
    "teacher_entropy": 0.5 * TOP,
    "batch_entropy": 0.8 * TOP,
    "information": 0.3 * TOP,
    "feature_std": 0.1,
    "rank_me": 30.0,
}
BAD = {
    UNIFORM: {"batch_entropy": TOP, "teacher_entropy": TOP, "information": 0.0, "loss": TOP},
    ONE_HOT: {"batch_entropy": 0.01, "teacher_entropy": 0.0, "information": 0.01, "loss": 0.01},
    DIMENSIONAL: {"feature_std": 0.01},
    DIVERGING: {"loss": 2 * TOP},
}


def yardstick(batch: int = 64, width: int = 64, warmup_epochs: float = 1.0) -> Yardstick:
    return Yardstick(prototypes=K, batch=batch, width=width, epochs=10, warmup_epochs=warmup_epochs)


def curve(*changes: dict[str, float]) -> list[dict[str, float]]:
    """Ten healthy points, from epoch 1 on, then one with each of these changes."""
    return [WELL | {"epoch": 1 + i / 10} | change for i, change in enumerate([{}] * 10 + list(changes))]


def settled(change: dict[str, float], batch: int = 64, width: int = 64) -> State:
    """The state where all last points have this change."""
    return diagnose(curve(*[change] * WINDOW), yardstick(batch, width)).state


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, HEALTHY),
        *((change, state) for state, change in BAD.items()),
        ({"loss": 1.2 * TOP}, HEALTHY),  # a student that lags behind its teacher, not one that runs away
        ({"loss": 1.3 * TOP}, DIVERGING),
        ({"batch_entropy": TOP, "teacher_entropy": TOP - 0.03, "information": 0.03}, HEALTHY),  # weak but there
        ({"batch_entropy": 0.6 * TOP, "information": 0.01}, UNIFORM),
        ({"batch_entropy": 0.4 * TOP, "information": 0.01}, ONE_HOT),
        ({"teacher_entropy": 0.01, "information": 0.8 * TOP}, HEALTHY),  # sharp, but spread over prototypes
        ({"rank_me": 7.9}, DIMENSIONAL),  # below an eighth of 64
        ({"rank_me": 8.1}, HEALTHY),
        ({"feature_std": 0.0126}, HEALTHY),  # a tenth of 1 / sqrt(64) is 0.0125
        (BAD[UNIFORM] | BAD[DIMENSIONAL], DIMENSIONAL),  # dead features say all the same: their cure comes first
        (BAD[DIVERGING] | BAD[DIMENSIONAL], DIVERGING),
    ],
)
def test_a_state_is_named(change: dict[str, float], expected: State) -> None:
    assert settled(change) == expected


@pytest.mark.parametrize("kind", BAD)
def test_one_or_two_odd_points_neither_raise_an_alarm_nor_turn_a_verdict(kind: State) -> None:
    """In any place of the window; the loss is already a mean over the steps since the point before."""
    odd = {name: value for name, value in BAD[kind].items() if name != "loss"} or {"loss": 1.5 * TOP}
    for places in ({0}, {2}, {4}, {1, 3}, {3, 4}):
        assert diagnose(curve(*(odd if i in places else {} for i in range(WINDOW))), yardstick()).state == HEALTHY
        if "loss" not in odd:
            ill = curve(*({} if i in places else odd for i in range(WINDOW)))
            assert diagnose(ill, yardstick()).state == kind
    assert diagnose(curve(*[odd] * 3), yardstick()).state == (HEALTHY if "loss" in odd else kind)


def test_a_loss_that_is_not_finite_is_told_at_once_and_at_any_time() -> None:
    for value in (math.nan, math.inf):
        assert diagnose(curve({"loss": value}), yardstick()).state == DIVERGING
        assert diagnose([WELL | {"epoch": 0.1, "loss": value}], yardstick()).state == DIVERGING


@pytest.mark.parametrize(("warmup_epochs", "first_epoch"), [(3.0, 3.0), (0.0, 1.0)])
def test_nothing_else_is_named_during_the_warm_up(warmup_epochs: float, first_epoch: float) -> None:
    points = [WELL | BAD[UNIFORM] | {"epoch": i / 10} for i in range(1, 100)]
    for end in range(1, len(points) + 1):
        found = diagnose(points[:end], yardstick(warmup_epochs=warmup_epochs)).state
        assert found == (WARMING_UP if points[end - 1]["epoch"] < first_epoch else UNIFORM)


def test_a_state_is_dated_by_its_first_point_without_another_in_between() -> None:
    points = curve(*[BAD[ONE_HOT]] * 6, *[{}] * 6, *[BAD[UNIFORM]] * 6)
    assert diagnose(points[:10], yardstick()).since_epoch == 1.0
    assert diagnose(points[:16], yardstick()).since_epoch == points[12]["epoch"]  # third of five
    assert diagnose(points[:22], yardstick()).since_epoch == points[18]["epoch"]
    found = diagnose(points, yardstick())
    assert (found.state, found.since_epoch) == (UNIFORM, points[24]["epoch"])


def test_the_states_of_a_curve_look_back_only() -> None:
    chooser = random.Random(0)
    points = curve(*(chooser.choice([{}, *BAD.values()]) for _ in range(40)))
    backwards = list(states(points, yardstick()))
    assert backwards[::-1] == [diagnose(points[:end], yardstick()).state for end in range(1, len(points) + 1)]
    assert len(set(backwards)) > 2


def test_few_images_raise_no_alarm_about_what_they_cannot_show() -> None:
    assert settled({"rank_me": 1.0}, batch=7) == settled({"rank_me": 1.0, "feature_std": 0.0}, batch=1) == HEALTHY
    assert settled({"feature_std": 0.0}, batch=2) == settled({"rank_me": 1.0}, batch=8) == DIMENSIONAL
    assert settled({"rank_me": 5.0}, batch=1024, width=384) == DIMENSIONAL
    assert settled({"rank_me": 5.0}, batch=32, width=384) == HEALTHY


@pytest.mark.parametrize("kind", BAD)
def test_an_alarm_has_numbers_and_names_settings_that_exist(kind: State) -> None:
    found = diagnose(curve(*[BAD[kind]] * WINDOW), yardstick())
    assert found.state == kind and kind.is_bad
    assert found.finding.endswith(".") and len(re.findall(r"\d", found.finding)) > 2
    named = re.findall(r"pretrain\.(\w+)", kind.advice)
    assert named and set(named) <= set(FIELD_NAMES)
    assert found.signs == pytest.approx(WELL | BAD[kind] | {"epoch": found.signs["epoch"]})


def test_six_states_four_of_them_bad() -> None:
    everything = [HEALTHY, WARMING_UP, UNIFORM, ONE_HOT, DIMENSIONAL, DIVERGING]
    assert len({state.name for state in everything}) == 6
    assert [state for state in everything if state.is_bad] == [UNIFORM, ONE_HOT, DIMENSIONAL, DIVERGING]
