"""The distribution of everything that is drawn for a crop. Seeds are fixed: a test passes always or never."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from dino.augment import CropDraws, draw_boxes, draw_view
from dino.config import PretrainConfig

ROWS = 20_000
CONFIG = PretrainConfig()  # the paper's
SURPRISE = 1e-3  # p-value below which a test speaks
VIEWS = pytest.mark.parametrize("view", [0, 1, 2, 9])


def view_of(view: int, height: int = 10_000, width: int = 10_000, step: int = 0, config=CONFIG) -> CropDraws:
    sizes = torch.tensor([[height, width]]).expand(ROWS, 2)
    return draw_view(config, view, step, torch.arange(ROWS), sizes)


def assert_share(found: Tensor, expected: float) -> None:
    assert found.dtype == torch.bool
    if expected in (0.0, 1.0):
        assert found.double().mean().item() == expected
    else:
        assert stats.binomtest(int(found.sum()), len(found), expected).pvalue > SURPRISE


def assert_uniform(found: Tensor, low: float, high: float) -> None:
    assert low <= found.min() and found.max() <= high
    assert stats.kstest(found.double().numpy(), "uniform", args=(low, high - low)).pvalue > SURPRISE


@VIEWS
def test_gates(view: int) -> None:
    d = view_of(view)
    kind = min(view, 2)
    assert_share(d.flip, 0.5)
    assert_share(d.jitter, 0.8)
    assert_share(d.grayscale, 0.2)
    assert_share(d.blur, (1.0, 0.1, 0.5)[kind])
    assert_share(d.solarize, (0.0, 0.2, 0.0)[kind])


@VIEWS
def test_strengths(view: int) -> None:
    d = view_of(view)
    for operation, reach in enumerate((0.4, 0.4, 0.2)):
        assert_uniform(d.factors[:, operation], 1 - reach, 1 + reach)
    assert_uniform(d.factors[:, 3], -0.1, 0.1)
    assert_uniform(d.radius, 0.1, 2.0)


def test_a_strength_above_one_stops_at_black() -> None:
    factors = view_of(0, config=PretrainConfig(brightness=1.5)).factors
    assert_uniform(factors[:, 0], 0.0, 2.5)


@VIEWS
def test_order_of_the_jitter(view: int) -> None:
    order = view_of(view).order
    assert (order.sort(dim=1).values == torch.arange(4)).all()
    counts = (order * 4 ** torch.arange(4)).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > SURPRISE


@pytest.mark.parametrize("view", [2, 9])
def test_boxes_of_locals(view: int) -> None:
    """Of a large square none is rejected: area and ratio have exactly the distributions that are asked for."""
    d = view_of(view)
    assert_uniform(d.height.double() * d.width / 1e8, 0.05 - 1e-4, 0.4 + 1e-4)
    ratio = torch.log(d.width.double() / d.height)
    assert_uniform(ratio, math.log(3 / 4) - 1e-3, math.log(4 / 3) + 1e-3)
    assert_uniform(d.top / (10_000 - d.height), 0, 1)
    assert_uniform(d.left / (10_000 - d.width), 0, 1)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (600, 1000)])
def test_boxes_of_globals(view: int, height: int, width: int) -> None:
    """They may not fit at the first attempt: the reference is torchvision's own drawing with the paper's scale."""
    d = view_of(view, height, width)
    torch.manual_seed(view)
    image = torch.zeros(3, height, width)
    boxes = [RandomResizedCrop.get_params(image, [0.4, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array(boxes).astype(float).T
    for found, expected in zip((d.top, d.left, d.height, d.width), theirs, strict=True):
        assert stats.ks_2samp(found.double().numpy(), expected).pvalue > SURPRISE
    assert stats.ks_2samp((d.height * d.width).double().numpy(), theirs[2] * theirs[3]).pvalue > SURPRISE


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (1000, 1000, (0.4, 1.0), (3 / 4, 4 / 3)),
        (700, 1000, (0.4, 1.0), (3 / 4, 4 / 3)),
        (28, 28, (0.5, 1.0), (3 / 4, 4 / 3)),
        (28, 28, (0.05, 0.4), (3 / 4, 4 / 3)),
        (600, 200, (0.9, 1.0), (3 / 4, 4 / 3)),  # nearly all fall back
    ],
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale, ratio) -> None:
    count = 4000
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(count, 22, generator=generator, dtype=torch.float64)
    ours = draw_boxes(u, torch.tensor([[height, width]]).expand(count, 2), scale, ratio).numpy()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > SURPRISE
    products = [boxes[:, 2].astype(float) * boxes[:, 3] for boxes in (ours, theirs)]
    assert stats.ks_2samp(*products).pvalue > SURPRISE


def slow_box(u: list[float], height: int, width: int, scale, ratio) -> list[int]:
    """torchvision's RandomResizedCrop.get_params with these draws of [0, 1)."""
    for a, r in zip(u[:10], u[10:20], strict=True):
        area = height * width * (scale[0] + a * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + r * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0), (0.95, 1.0)])
def test_boxes_of_images_of_all_sizes_are_torchvisions_with_the_same_draws(scale) -> None:
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(600, 22, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 200, (600, 2), generator=generator)
    sizes[:3] = torch.tensor([[1, 1], [1, 150], [150, 1]])
    ratio = (3 / 4, 4 / 3)
    found = draw_boxes(u, sizes, scale, ratio)
    expected = [slow_box(r, h, w, scale, ratio) for r, (h, w) in zip(u.tolist(), sizes.tolist(), strict=True)]
    assert found.tolist() == expected
    top, left, height, width = found.unbind(1)
    assert (found[:, :2] >= 0).all() and (found[:, 2:] >= 1).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


def test_boxes_touch_both_edges_as_often_as_any_place() -> None:
    d = view_of(2, 28, 28)
    for start, length in ((d.top, d.height), (d.left, d.width)):
        last = 28 - length
        chance = 1 / (last + 1.0).double()  # as many places as that, equally likely
        spread = (chance * (1 - chance)).sum().sqrt()
        for touches in (start == 0, start == last, start == last // 2):
            assert abs(touches.sum() - chance.sum()) < 4 * spread


def columns(d: CropDraws) -> Tensor:
    """Everything drawn, a column each."""
    single = [d.top, d.left, d.height, d.width, d.flip, d.jitter, d.grayscale, d.blur, d.radius, d.solarize]
    return torch.stack([*(x.double() for x in single), *d.factors.T, *d.order.T.double()[:3]], dim=1)


def test_draws_do_not_know_of_each_other() -> None:
    """Neither within a sample, nor from view to view, step to step or row to row."""
    a, b, c = columns(view_of(1)), columns(view_of(2)), columns(view_of(1, step=1))
    everything = torch.cat([a[:-1], b[:-1], c[:-1], a[1:]], dim=1)
    everything = everything[:, everything.std(dim=0) > 0]
    correlations = torch.corrcoef(everything.T)
    width = a.shape[1]
    expected = torch.eye(len(correlations), dtype=torch.bool)
    # places 0, 1 and 2 of an order exclude each other; height and width share the area; a box's place depends
    # on its size not in the mean but in its reach
    orders, boxes = range(width - 3, width), range(4)
    kept = [i for part in (a, b, c, a) for i in (part.std(dim=0) > 0).tolist()]
    origin = [i for i, keep in enumerate(kept) if keep]
    for i, x in enumerate(origin):
        for j, y in enumerate(origin):
            same_sample = x // width == y // width
            if same_sample and any(x % width in group and y % width in group for group in (orders, boxes)):
                expected[i, j] = True
    limit = 4.5 / math.sqrt(ROWS)
    assert correlations[~expected].abs().max() < limit
