"""How fast a training goes, and which part of the time it waits for images; told and logged, never part of an out."""

import time
from collections.abc import Callable

MUCH = 0.15  # of the time spent waiting: worth doing something about
ADVICE = (
    "reading and decoding images is slower than training on them: prepare smaller ones (data.max_short_px), put "
    "data/prepared on a faster disk, or give the process more cores"
)


class Pace:
    """Counts images and seconds of waiting from its creation on."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.began = now()
        self.images = 0
        self.waited_seconds = 0.0

    def waited(self, seconds: float) -> None:
        """A step's images were late by so much."""
        self.waited_seconds += seconds

    def numbers(self) -> dict[str, float]:
        """Images per second, and the share of the time spent waiting for data, 0 to 1."""
        seconds = max(self.now() - self.began, 1e-9)
        return {
            "images_per_second": self.images / seconds,
            "waiting_for_data": min(self.waited_seconds / seconds, 1.0),
        }

    def note(self) -> str:
        """For the line of progress: nothing while little is waited."""
        share = self.numbers()["waiting_for_data"]
        return f", {share:.0%} of the time waiting for data" if share >= MUCH else ""

    def verdict(self) -> str:
        """How it went, with advice where much was waited."""
        numbers = self.numbers()
        share = numbers["waiting_for_data"]
        told = f"{numbers['images_per_second']:,.0f} images/s, {share:.0%} of the time waiting for data"
        return f"{told}: {ADVICE}" if share >= MUCH else told
