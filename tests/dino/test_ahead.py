"""Batches made ahead: the same, in order, no more than a few of them, and the wait is counted."""

import threading
import time
from contextlib import closing

import pytest

from dino.ahead import BATCHES_AHEAD, ahead


def test_everything_comes_once_in_order() -> None:
    assert list(ahead(lambda key: key * 2, range(7))) == [0, 2, 4, 6, 8, 10, 12]
    assert list(ahead(lambda key: key, [])) == []


def test_a_few_are_made_ahead_and_no_more() -> None:
    made = threading.Semaphore(0)
    count = []

    def make(key: int) -> int:
        count.append(key)
        made.release()
        return key

    with closing(ahead(make, range(100))) as results:
        assert next(results) == 0
        for _ in range(1 + BATCHES_AHEAD):
            assert made.acquire(timeout=10)
        assert not made.acquire(timeout=0.05)  # the next is made when another is taken
    assert len(count) == 1 + BATCHES_AHEAD


def test_an_error_comes_where_its_result_would() -> None:
    def make(key: int) -> float:
        return 1 / (2 - key)

    results = ahead(make, range(5))
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_waiting_is_counted_where_making_is_slow_and_only_there() -> None:
    slow: list[float] = []
    assert len(list(ahead(lambda key: time.sleep(0.05), range(4), waited=slow.append))) == 4
    assert len(slow) == 4 and sum(slow) >= 0.15
    quick: list[float] = []
    for _ in ahead(lambda key: key, range(4), waited=quick.append):
        time.sleep(0.05)
    assert sum(quick[1:]) < 0.05
