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
        seconds_of_a_save: What the last one took; 0 before the first.
        now: A clock, in seconds.
    """

    def __init__(
        self,
        minutes: float | None,
        steps: int | None,
        seconds_of_a_save: Callable[[], float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.minutes, self.steps = minutes, steps
        self.seconds_of_a_save, self.now = seconds_of_a_save, now
        self.steps_since, self.last = 0, now()

    def __call__(self) -> bool:
        """Whether to save now; asked once after each step."""
        self.steps_since += 1
        by_steps = self.steps is not None and self.steps_since >= self.steps
        if not by_steps:
            if self.minutes is None:
                return False
            interval = max(60 * self.minutes, self.seconds_of_a_save() / MAX_SHARE)
            if self.now() - self.last < interval:
                return False
        self.steps_since, self.last = 0, self.now()
        return True
