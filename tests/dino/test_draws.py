"""The counter-based generator: splitmix64 bit for bit, uniform, and a function of nothing but its arguments."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dino import draws

GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


class SplitMix64:
    """Steele, Lea and Flood 2014, as Vigna's C code writes it; plain Python integers."""

    def __init__(self, state: int) -> None:
        self.state = state & MASK

    def next(self) -> int:
        self.state = (self.state + GOLDEN) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def slow_bits(seed: int, purpose: int, step: int, row: int) -> int:
    key = 0
    for part in (seed, purpose, step):
        key = SplitMix64(key + part * GOLDEN).next()
    return SplitMix64(key + (row - 1) * GOLDEN).next()


def slow_uniform(seed: int, purpose: int, step: int, row: int, count: int) -> list[float]:
    generator = SplitMix64(slow_bits(seed, purpose, step, row))
    return [(generator.next() >> 11) / 2**53 for _ in range(count)]


def test_splitmix64_gives_its_published_numbers() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in published] == published
    counters = torch.tensor([draws._signed(1234567 + i * GOLDEN) for i in range(1, 5)])
    assert [int(x) & MASK for x in draws._mix(counters)] == published


@pytest.mark.parametrize("seed", [0, 1, 2**40, 2**63 + 5])
@pytest.mark.parametrize("step", [0, 123_456])
def test_draws_are_the_slow_ones_to_the_bit(seed: int, step: int) -> None:
    rows = [0, 1, 7, 2**33]
    for purpose in (draws.CROPS, draws.CROPS + 3, draws.DROP_PATH):
        found = draws.uniform(seed, purpose, step, torch.tensor(rows), 5)
        assert found.dtype == torch.float64
        assert found.tolist() == [slow_uniform(seed, purpose, step, row, 5) for row in rows]


def test_order_is_the_slow_one() -> None:
    keys = [slow_bits(3, draws.ORDER, 2, row) for row in range(50)]
    signed = [key - 2**64 if key >> 63 else key for key in keys]
    assert draws.epoch_order(3, 2, 50).tolist() == sorted(range(50), key=signed.__getitem__)


def test_a_row_depends_on_itself_only() -> None:
    rows = torch.arange(64)
    whole = draws.uniform(1, draws.CROPS, 9, rows, 30)
    shuffled = torch.tensor(np.random.default_rng(0).permutation(64))
    torch.testing.assert_close(draws.uniform(1, draws.CROPS, 9, shuffled, 30), whole[shuffled], rtol=0, atol=0)
    for rank in range(4):  # ranks take contiguous shares
        share = rows[16 * rank : 16 * rank + 16]
        torch.testing.assert_close(draws.uniform(1, draws.CROPS, 9, share, 30), whole[share], rtol=0, atol=0)
    torch.testing.assert_close(draws.uniform(1, draws.CROPS, 9, rows, 7), whole[:, :7], rtol=0, atol=0)
    assert draws.uniform(1, draws.CROPS, 9, rows[:0], 7).shape == (0, 7)


@pytest.mark.parametrize(
    ("seeds", "purposes", "steps", "rows", "count"),
    [
        ([0], [draws.CROPS], [0], 50_000, 1),
        ([0], [draws.CROPS], [0], 1, 50_000),
        ([0], [draws.CROPS], range(2000), 25, 1),
        (range(2000), [draws.CROPS], [0], 25, 1),
        ([0], range(draws.CROPS, draws.CROPS + 200), [0], 250, 1),
    ],
    ids=["rows", "indices", "steps", "seeds", "purposes"],
)
def test_draws_are_uniform_and_independent_along(seeds, purposes, steps, rows, count) -> None:
    found = torch.stack(
        [
            draws.uniform(seed, purpose, step, torch.arange(rows), count)
            for seed in seeds
            for purpose in purposes
            for step in steps
        ]
    ).flatten()
    assert found.min() >= 0 and found.max() < 1
    assert len(found.unique()) == len(found) == 50_000
    assert stats.kstest(found.numpy(), "uniform").pvalue > 1e-3
    # the low bits too, and neighbours do not know of each other
    low = (found * 2**40) % 1
    assert stats.kstest(low.numpy(), "uniform").pvalue > 1e-3
    pairs = torch.histogramdd(torch.stack([found[:-1], found[1:]], dim=1), bins=[16, 16], range=[0, 1, 0, 1])
    assert stats.chisquare(pairs.hist.flatten().numpy()).pvalue > 1e-3
    for lag in (1, 2, 25, 36, 250):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 4 / math.sqrt(len(found))


def test_an_order_is_a_permutation_of_all_images_and_another_each_epoch() -> None:
    orders = [draws.epoch_order(0, epoch, 1000) for epoch in range(5)] + [draws.epoch_order(1, 0, 1000)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(1000))
    for i, a in enumerate(orders):
        assert not (a == torch.arange(1000)).float().mean() > 0.01
        for b in orders[:i]:
            assert (a == b).float().mean() < 0.01
    torch.testing.assert_close(draws.epoch_order(0, 3, 1000), orders[3], rtol=0, atol=0)


def test_every_image_comes_at_every_place() -> None:
    orders = torch.stack([draws.epoch_order(0, epoch, 6) for epoch in range(6000)])
    counts = torch.stack([torch.bincount(orders[:, place], minlength=6) for place in range(6)])
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3
    # all 720 orders, equally often
    codes = (orders * 6 ** torch.arange(6)).sum(1).unique(return_counts=True)[1]
    assert len(codes) == pytest.approx(720, abs=3)
    assert stats.chisquare(codes.numpy()).pvalue > 1e-3
