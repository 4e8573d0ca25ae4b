"""Where the curve has points."""

import pytest

from dino.curve import CURVE_POINTS, MIN_CURVE_STEPS, has_point


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs"), [(937, 5), (1, 1), (1, 40), (3, 7), (5, 3), (9, 100), (7, 800), (25_000, 100)]
)
def test_points_are_even_in_each_epoch_and_at_its_end(steps_per_epoch: int, epochs: int) -> None:
    total = steps_per_epoch * epochs
    points = [step for step in range(1, total + 1) if has_point(step, steps_per_epoch, total)]
    assert points[-1] == total
    gaps = [after - before for before, after in zip([0, *points], points, strict=False)]
    assert min(gaps[:-1], default=MIN_CURVE_STEPS) >= MIN_CURVE_STEPS  # what is left at the run's end may be less
    assert len(points) <= max(2 * CURVE_POINTS, epochs)
    if steps_per_epoch >= MIN_CURVE_STEPS:
        assert set(range(steps_per_epoch, total + 1, steps_per_epoch)) <= set(points)
        assert max(gaps) - min(gaps) <= 1
    else:
        assert all(step % steps_per_epoch == 0 for step in points)
