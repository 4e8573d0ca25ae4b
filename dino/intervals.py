"""How far a share of right answers can be trusted."""

import math

Z95 = 1.959963984540054  # standard normal deviations that hold 95 %


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (low, high) of a share `right / count`; (0, 1) when nothing was counted.

    Raises:
        ValueError: not 0 <= right <= count.
    """
    if not 0 <= right <= count:
        raise ValueError(f"right is {right} of {count}; it must be from 0 to that")
    if count == 0:
        return 0.0, 1.0
    share = right / count
    spread = Z95 * math.sqrt(share * (1 - share) / count + (Z95 / (2 * count)) ** 2)
    centre = share + Z95**2 / (2 * count)
    scale = 1 + Z95**2 / count
    # rounding alone would put an end on the wrong side of a share of 0 or 1
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
