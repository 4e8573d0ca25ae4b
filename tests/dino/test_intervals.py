"""Laws of Wilson's interval: its defining equation, published values, ends."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dino.intervals import Z95, wilson_interval


@example((0, 3))  # without care an end lies 5e-17 on the wrong side
@example((7, 7))
@given(st.integers(1, 100_000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_ends_lie_z_standard_errors_from_the_share(right_count: tuple[int, int]) -> None:
    """Wilson 1927: each end p solves (right / count - p)^2 = z^2 p (1 - p) / count."""
    right, count = right_count
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for end in (low, high):
        assert (right / count - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / count, abs=1e-12)


def test_published_value() -> None:
    """Newcombe 1998, table I, method 3 (Wilson without continuity correction)."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_nothing_counted_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_more_right_than_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="right is 3 of 2"):
        wilson_interval(3, 2)
