"""Vital signs against slow sums, and at their extremes."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.vital_signs import measure, rank_me

B, K, D = 12, 10, 6
NAMES = ["teacher_entropy", "batch_entropy", "information", "feature_std", "rank_me"]


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
        "information": sum(p * math.log(p / q) for row in probabilities for p, q in zip(row, mean, strict=True))
        / len(probabilities),
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
    assert [one_hot[name] for name in NAMES] == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)
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
