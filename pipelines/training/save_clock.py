"""When a training's state is due to be saved."""

import time
from collections.abc import Callable

MAX_SHARE = 0.02  # of the time, for saves by minutes


class SaveClock:
    """Due each so many minutes or steps, whichever comes first.

    Saves by minutes take at most MAX_SHARE of the time: where a save is slow (a big model, a slow disk), they come less
    often. Saves by steps come as they are asked for.

    Args:
        minutes: None: only by steps.
        steps: None: only by minutes.
        saved_at: When the last save ended, by the same clock; anything before the start: none yet.
        now: A clock, in seconds.
    """

    def __init__(
        self,
        minutes: float | None,
        steps: int | None,
        saved_at: Callable[[], float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.minutes, self.steps = minutes, steps
        self.saved_at, self.now = saved_at, now
        self.steps_since, self.last = 0, now()

    def __call__(self) -> bool:
        """Whether to save now; asked once after each step."""
        self.steps_since += 1
        by_steps = self.steps is not None and self.steps_since >= self.steps
        if not by_steps:
            if self.minutes is None:
                return False
            cost = self.saved_at() - self.last  # from the word to save, so with the copy off the device
            interval = max(60 * self.minutes, cost / MAX_SHARE)
            if self.now() - self.last < interval:
                return False
        self.steps_since, self.last = 0, self.now()
        return True
