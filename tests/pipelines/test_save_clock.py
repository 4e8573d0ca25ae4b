"""Saves by minutes, by steps or by both; saving never takes more than its share of the time."""

import pytest

from pipelines.training.save_clock import MAX_SHARE, SaveClock


def saved_at(
    minutes: float | None, steps: int | None, count: int, step_s: float = 10.0, save_s: float = 0.0
) -> list[int]:
    """Steps after which a training of `count` steps saves, each step and save of this many seconds."""
    time, found, saved = 0.0, [], float("-inf")
    clock = SaveClock(minutes, steps, lambda: saved, now=lambda: time)
    for step in range(1, count + 1):
        time += step_s
        if clock():
            found.append(step)
            time += save_s
            saved = time
    return found


@pytest.mark.parametrize(
    ("minutes", "steps", "expected"),
    [
        (1.0, None, [6, 12, 18]),
        (None, 4, [4, 8, 12, 16, 20]),
        (1.0, 4, [4, 8, 12, 16, 20]),
        (0.5, 4, [3, 6, 9, 12, 15, 18]),
        (0.6, 5, [4, 8, 12, 16, 20]),
    ],
)
def test_minutes_or_steps_whichever_comes_first(minutes: float | None, steps: int | None, expected: list[int]) -> None:
    assert saved_at(minutes, steps, 20) == expected


@pytest.mark.parametrize("save_s", [0.1, 3.0, 30.0])
def test_saving_by_minutes_takes_its_share_at_most(save_s: float) -> None:
    count = 20_000
    saves = len(saved_at(2.0, None, count, save_s=save_s)) - 1  # the first could not know
    assert saves > 50
    assert saves * save_s <= MAX_SHARE * (count * 10.0 + saves * save_s)


def test_saving_by_steps_is_done_as_asked_whatever_it_takes() -> None:
    assert saved_at(None, 5, 20, save_s=1000.0) == [5, 10, 15, 20]
