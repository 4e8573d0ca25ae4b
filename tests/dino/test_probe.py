"""Laws of probes: torch's own SGD on whitened features, many settings as one, invariances, divergence."""

import math

import pytest
import torch
from torch import nn

from dino.probe import Setting, train_probes
from dino.regression import Classifiers, _softmax

SETTINGS = [Setting(0.03, 1e-3), Setting(1.0, 1e-3), Setting(0.3, 1.0)]
KWARGS = {"epochs": 4, "batch": 32, "momentum": 0.9, "seed": 5}


def blobs(seed: int = 0, *, count: int = 150, width: int = 6, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three centres, in float64."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=draw)
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 3
    noise = torch.randn(count, width, generator=draw, dtype=torch.float64)
    return centres[labels] + spread * noise, torch.tensor([-7, 4, 4_000_000_000])[labels]


def slow_probe(features: torch.Tensor, labels: torch.Tensor, setting: Setting, queries: torch.Tensor) -> torch.Tensor:
    """Scores [M, C] of one probe: torch.optim.SGD with a cosine on features that were whitened beforehand."""
    mean = features.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(features.T, correction=0))
    whiten = axes / (variance + setting.damping * variance.mean()).sqrt()
    classes, columns = labels.unique(return_inverse=True)
    probe = nn.Linear(features.shape[1], len(classes), dtype=torch.float64)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    steps = 4 * math.ceil(len(features) / 32)
    optimizer = torch.optim.SGD(probe.parameters(), lr=setting.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(4):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch))
        for rows in order.split(32):
            loss = nn.functional.cross_entropy(probe((features[rows] - mean) @ whiten), columns[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe((queries - mean) @ whiten).detach()


def scores(probes: Classifiers, queries: torch.Tensor) -> torch.Tensor:
    """[S, M, C] from the published weights."""
    return torch.einsum("md,dsc->smc", queries - probes.centre_D, probes.weights_DSC) + probes.bias_SC[:, None]


def test_many_at_once_equal_torch_sgd_one_by_one_on_whitened_features() -> None:
    features, labels = blobs(spread=3)
    queries, _ = blobs(1, count=40, spread=3)
    probes = train_probes(features, labels, settings=SETTINGS, **KWARGS)
    found = scores(probes, queries)
    for index, setting in enumerate(SETTINGS):
        expected = slow_probe(features, labels, setting, queries)
        torch.testing.assert_close(found[index], expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(probes.predict(queries)[index], torch.tensor([-7, 4, 4_000_000_000])[expected.argmax(1)])


def test_right_counts_right_predictions() -> None:
    features, labels = blobs(spread=4)
    queries, truth = blobs(1, count=5000, spread=4)  # more than are predicted at once
    probes = train_probes(features, labels, settings=SETTINGS, **KWARGS)
    right = (scores(probes, queries).argmax(2) == truth.unique(return_inverse=True)[1]).sum(1)
    assert probes.right(queries, truth) == right.tolist()
    assert 0.4 * 5000 < int(right[1]) < 5000


def test_separable_classes_are_learnt() -> None:
    features, labels = blobs(spread=0.1)
    probes = train_probes(features.float(), labels, settings=SETTINGS, **KWARGS | {"epochs": 30})
    queries, truth = blobs(1, spread=0.1)
    assert probes.right(queries.float(), truth) == [len(truth)] * 3


def test_shift_scale_and_rotation_of_features_change_nothing() -> None:
    features, labels = blobs(spread=3)
    queries, _ = blobs(1, count=400, spread=3)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    plain = scores(train_probes(features, labels, settings=SETTINGS, **KWARGS), queries)
    other = scores(
        train_probes(features @ turn * 1e-3 + 50, labels, settings=SETTINGS, **KWARGS),
        queries @ turn * 1e-3 + 50,
    )
    torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-6)


def test_weak_axes_that_carry_the_class_are_found_beside_strong_ones_that_do_not() -> None:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (2000,), generator=draw)
    features = torch.randn(2000, 16, generator=draw) * 10
    features[:, 3] = 0.05 * (labels - 0.5 + 0.1 * torch.randn(2000, generator=draw))
    probes = train_probes(features, labels, settings=[Setting(1.0, 1e-4)], **KWARGS)
    (right,) = probes.right(features, labels)
    assert right is not None and right > 1980


def test_the_same_call_gives_the_same_bits_and_another_seed_another_order() -> None:
    features, labels = blobs(spread=3)
    first, second, other = (
        train_probes(features.float(), labels, settings=SETTINGS, **KWARGS | {"seed": seed}) for seed in (5, 5, 6)
    )
    assert torch.equal(first.weights_DSC, second.weights_DSC)
    assert torch.equal(first.bias_SC, second.bias_SC)
    assert not torch.equal(first.weights_DSC, other.weights_DSC)


def test_a_setting_that_diverges_has_no_score_and_leaves_the_others_alone() -> None:
    features, labels = blobs(spread=3)
    features, settings = features.float(), [SETTINGS[0], Setting(1e38, 1e-3), SETTINGS[1]]
    probes = train_probes(features, labels, settings=settings, **KWARGS)
    right = probes.right(features, labels)
    alone = train_probes(features, labels, settings=SETTINGS[:2], **KWARGS)
    assert right[1] is None
    assert [right[0], right[2]] == alone.right(features, labels)


@pytest.mark.parametrize("classes", [2, 50, 51, 200])
def test_softmax_is_torchs_whatever_the_number_of_classes(classes: int) -> None:
    logits = torch.randn(7, 3, classes, generator=torch.Generator().manual_seed(classes)) * 100
    logits[0, 0] = torch.inf
    torch.testing.assert_close(_softmax(logits.clone()), logits.softmax(2), equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_and_one_class(count: int) -> None:
    features, _ = blobs(count=count)
    labels = torch.full((count,), 3)
    probes = train_probes(features.float(), labels, settings=SETTINGS, **KWARGS)
    assert probes.right(features.float(), labels) == [count] * 3


def test_features_that_are_all_the_same_give_the_commonest_class() -> None:
    """A collapsed network is judged, not refused."""
    labels = torch.tensor([1, 2, 2, 2] * 25)
    probes = train_probes(torch.full((100, 6), 0.1), labels, settings=SETTINGS, **KWARGS)
    assert probes.right(torch.full((100, 6), 0.1), labels) == [75] * 3


def test_bad_input_is_refused_with_place_and_cure() -> None:
    features, labels = blobs()
    with pytest.raises(ValueError, match="no labelled images"):
        train_probes(features[:0], labels[:0], settings=SETTINGS, **KWARGS)
    with pytest.raises(ValueError, match=r"probe\.lrs holds 0\.0.*above 0"):
        train_probes(features, labels, settings=[Setting(0.0, 1.0)], **KWARGS)
    features[3, 2] = torch.inf
    with pytest.raises(ValueError, match="not all finite"):
        train_probes(features, labels, settings=SETTINGS, **KWARGS)
