"""The collapse doctor on made numbers: vital signs against slow sums, states by their definitions."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.config import FIELD_NAMES
from dino.health import (
    DIMENSIONAL,
    DIVERGING,
    HEALTHY,
    ONE_HOT,
    UNIFORM,
    WARMING_UP,
    Diagnosis,
    diagnose,
    measure,
    rank_me,
)

B, K, D = 12, 10, 6
NAMES = ["teacher_entropy", "batch_entropy", "feature_std", "rank_me"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def signs(teacher_out: Tensor, features: Tensor, center: Tensor | None = None, temperature: float = 1.0, **more: Any):
    center = torch.zeros(1, teacher_out.shape[1]) if center is None else center
    found = measure(teacher_out, center, temperature, features, **more)
    assert list(found) == NAMES and all(value.shape == () for value in found.values())
    return {name: value.item() for name, value in found.items()}


def by_hand(teacher_out: Tensor, center: Tensor, temperature: float, features: Tensor) -> dict[str, float]:
    """The definitions as plain loops in float64."""
    probabilities = []
    for row in ((teacher_out - center) / temperature).double().tolist():
        weights = [math.exp(score) for score in row]
        probabilities.append([weight / sum(weights) for weight in weights])
    entropies = [-sum(p * math.log(p) for p in row) for row in probabilities]
    mean = [sum(column) / len(column) for column in zip(*probabilities, strict=True)]
    unit = [[x / math.hypot(*row) for x in row] for row in features.double().tolist()]
    stds, centred = [], []
    for column in zip(*unit, strict=True):
        middle = sum(column) / len(column)
        stds.append(math.sqrt(sum((x - middle) ** 2 for x in column) / len(column)))
        centred.append([x - middle for x in column])
    eigenvalues = np.linalg.eigvalsh(np.array(centred) @ np.array(centred).T)  # [D, D]; singular values squared
    singular = [math.sqrt(value) for value in eigenvalues if value > 1e-12]
    shares = [value / sum(singular) for value in singular]
    return {
        "teacher_entropy": sum(entropies) / len(entropies),
        "batch_entropy": -sum(p * math.log(p) for p in mean),
        "feature_std": sum(stds) / len(stds),
        "rank_me": math.exp(-sum(share * math.log(share) for share in shares)),
    }


@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_vital_signs_are_their_definitions(temperature: float) -> None:
    teacher_out, center, features = torch.randn(2 * B, K) / 10, torch.randn(1, K) / 10, torch.randn(B, D)
    expected = by_hand(teacher_out, center, temperature, features)
    assert signs(teacher_out, features, center, temperature) == pytest.approx(expected, rel=1e-4)


def test_extremes() -> None:
    spread = torch.cat([torch.eye(D), -torch.eye(D)])
    uniform = signs(torch.ones(2 * B, K), spread)
    assert uniform["teacher_entropy"] == pytest.approx(math.log(K))
    assert uniform["batch_entropy"] == pytest.approx(math.log(K))
    assert uniform["feature_std"] == pytest.approx(1 / math.sqrt(D))
    assert uniform["rank_me"] == pytest.approx(D)
    one_hot = signs(1000 * torch.eye(K)[[3] * 2 * B], torch.ones(B, D))
    assert [one_hot[name] for name in NAMES] == pytest.approx([0, 0, 0, 1], abs=1e-6)
    healthy = signs(1000 * torch.eye(K).repeat(2, 1), torch.randn(B, D))
    assert healthy["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert healthy["batch_entropy"] == pytest.approx(math.log(K))


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_rank_me_counts_directions(directions: int) -> None:
    assert rank_me(torch.eye(20, 8)[:, :directions]) == pytest.approx(directions)
    features = torch.randn(50, directions) @ torch.linalg.qr(torch.randn(8, directions)).Q.T
    assert 1 <= rank_me(features) <= directions + 1e-3


def test_the_centre_is_taken_off() -> None:
    teacher_out, features = torch.zeros(2 * B, K), torch.randn(B, D)
    teacher_out[:, 3] = 5.0
    assert signs(teacher_out, features, temperature=0.04)["batch_entropy"] < 0.01
    assert signs(teacher_out, features, teacher_out[:1], 0.04)["batch_entropy"] == pytest.approx(math.log(K))


def test_ranks_see_the_signs_of_the_whole_batch() -> None:
    teacher_out, features = 5 * torch.randn(2 * B, K), torch.randn(B, D)
    whole = signs(teacher_out, features)
    means: list[list[Tensor]] = [[], []]
    for mine, half in zip(means, teacher_out.chunk(2), strict=True):
        signs(half, features, mean_over_ranks=lambda x, mine=mine: mine.append(x) or x)
    averages = iter([(a + b) / 2 for a, b in zip(*means, strict=True)])
    found = signs(teacher_out[:B], features, mean_over_ranks=lambda _: next(averages))
    assert found == pytest.approx(whole, rel=1e-5)


def test_one_image_and_what_is_not_finite_end_in_numbers() -> None:
    assert all(math.isfinite(value) for value in signs(torch.randn(2, K), torch.randn(1, D)).values())
    broken = signs(torch.randn(2 * B, K), torch.full((B, D), torch.nan))
    assert math.isnan(broken["feature_std"])  # told by the loop; a solver that raised would say less


def test_half_precision_is_measured_in_full() -> None:
    teacher_out, features = torch.randn(2 * B, K).bfloat16(), torch.randn(B, D).bfloat16()
    found = measure(teacher_out, torch.zeros(1, K), 0.04, features)
    assert all(value.dtype == torch.float32 for value in found.values())


# States

TOP = math.log(1024)
WELL = {
    "step": 500.0,
    "loss": 5.0,
    "teacher_entropy": 0.5 * TOP,
    "batch_entropy": 0.8 * TOP,
    "feature_std": 0.1,
    "rank_me": 30.0,
}


def state_of(*changes: dict[str, float], batch: int = 64, width: int = 64) -> Diagnosis:
    """Of a curve whose last point has these changes; any earlier ones come before it."""
    points = [WELL | {"step": 200.0 + 10 * i} | change for i, change in enumerate(changes[:-1])]
    return diagnose([*points, WELL | changes[-1]], prototypes=1024, batch=batch, width=width, total_steps=1000)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, HEALTHY),
        ({"loss": 6.9}, HEALTHY),  # high, but not run away
        ({"teacher_entropy": 0.97 * TOP}, HEALTHY),
        ({"teacher_entropy": 0.99 * TOP, "batch_entropy": 0.99 * TOP, "loss": TOP}, UNIFORM),
        ({"teacher_entropy": 0.01, "batch_entropy": 0.02}, ONE_HOT),
        ({"teacher_entropy": 0.01}, HEALTHY),  # sharp, but spread over prototypes
        ({"rank_me": 1.2}, DIMENSIONAL),
        ({"rank_me": 2.5}, DIMENSIONAL),  # below 0.04 of 64
        ({"rank_me": 3.0}, HEALTHY),
        ({"feature_std": 0.01}, DIMENSIONAL),  # a tenth of 1 / sqrt(64) is 0.0125
        ({"feature_std": 0.02}, HEALTHY),
        ({"loss": math.nan}, DIVERGING),
        ({"loss": math.inf, "step": 1.0}, DIVERGING),  # at any time
        ({"step": 50.0, "rank_me": 1.0, "teacher_entropy": TOP}, WARMING_UP),
        ({"step": 100.0, "rank_me": 1.0}, DIMENSIONAL),  # the warm-up is over
    ],
)
def test_a_state_is_named(change: dict[str, float], expected: Diagnosis) -> None:
    assert state_of(change) is expected


def test_divergence_is_a_loss_that_runs_away_from_its_lowest() -> None:
    assert state_of({"loss": 4.0}, {"loss": 1.6 * TOP}) is DIVERGING
    assert state_of({"loss": 4.0}, {"loss": 0.9 * TOP}) is HEALTHY  # 1.56 of the lowest, but below ln K
    assert state_of({"loss": 6.5}, {"loss": 1.01 * TOP}) is HEALTHY  # above ln K, but near the lowest
    assert state_of({"loss": 4.0}, {"loss": 1.6 * TOP}, {}) is HEALTHY  # over: now is what counts


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_few_images_raise_no_alarm_about_directions(batch: int) -> None:
    assert state_of({"rank_me": 1.0, "feature_std": 0.0}, batch=batch) is HEALTHY
    assert state_of({"rank_me": 1.0}, batch=8) is DIMENSIONAL


def test_the_rank_that_is_low_depends_on_the_rows_that_can_show_it() -> None:
    assert state_of({"rank_me": 5.0}, batch=1024, width=384) is DIMENSIONAL
    assert state_of({"rank_me": 5.0}, batch=32, width=384) is HEALTHY


def test_every_advice_names_settings_that_exist() -> None:
    for diagnosis in (UNIFORM, ONE_HOT, DIMENSIONAL, DIVERGING):
        named = re.findall(r"pretrain\.(\w+)", diagnosis.advice)
        assert named and set(named) <= set(FIELD_NAMES), diagnosis.state
    assert len({d.state for d in (HEALTHY, WARMING_UP, UNIFORM, ONE_HOT, DIMENSIONAL, DIVERGING)}) == 6
