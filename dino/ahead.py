"""Batches made ahead of who uses them, by a thread; and how long the user waited for them."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")

BATCHES_AHEAD = 2  # evens out batches that take longer than others; more only costs memory


def ahead(
    make: Callable[[Key], Made],
    keys: Iterable[Key],
    *,
    waited: Callable[[float], None] = lambda seconds: None,
) -> Generator[Made, None, None]:
    """`make(key)` for each key in order, up to BATCHES_AHEAD of them made before they are asked for.

    Args:
        make: Called in one thread, one key at a time; what it raises is raised here.
        keys: What to make.
        waited: Called before each result with the seconds that it was late.
    """
    waiting: deque[Future[Made]] = deque()

    def take() -> Made:
        began = time.perf_counter()
        made = waiting.popleft().result()
        waited(time.perf_counter() - began)
        return made

    with ThreadPoolExecutor(1) as maker:
        try:
            for key in keys:
                waiting.append(maker.submit(make, key))
                if len(waiting) > BATCHES_AHEAD:
                    yield take()
            while waiting:
                yield take()
        finally:
            maker.shutdown(wait=False, cancel_futures=True)  # who stops early waits for one batch at most
