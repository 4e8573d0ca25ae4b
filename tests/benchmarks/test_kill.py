"""Killed at seeded moments and run again by `dvc repro`, a training ends in the bytes of a quiet one."""

import random
from collections import Counter

import pytest

from benchmarks.kill import END, PHASES, STEP, WRITE, broken, main, plan


def test_three_kills(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "3", "--seed", "1"]) == 0, capsys.readouterr()


@pytest.mark.acceptance
def test_twenty_kills(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "20", "--seed", "2"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("kills", [1, 2, 3, 4, 10, 20, 57])
def test_a_plan_has_so_many_kills_and_those_after_the_last_step_come_last(kills: int) -> None:
    phases = plan(kills, random.Random(kills))
    assert len(phases) == kills
    ends = Counter(phases)[END]
    assert ends and phases[-ends:] == [END] * ends
    assert kills < len(PHASES) or set(phases) == set(PHASES)


GOOD = {
    "kills": 4,
    "landed": dict.fromkeys(PHASES, 1),
    "different": [],
    "resumed_from_0": 0,
    "resumed_mid_epoch": 2,
    "resumed_before_the_end": 3,
    "most_steps_redone": 5,
    "save_steps": 5,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"different": ["models/teacher.safetensors"]}, ["other bytes: models/teacher.safetensors"]),
        ({"resumed_from_0": 1}, ["a restart after a save began from the start"]),
        ({"resumed_mid_epoch": 1}, ["less than half of the restarts were in mid-epoch"]),
        ({"most_steps_redone": 6}, ["more steps redone than lie between two saves"]),
        ({"landed": {STEP: 4, END: 1}}, ["no kill landed in: start-up", f"no kill landed in: {WRITE}"]),
    ],
)
def test_what_does_not_hold_is_named(change: dict[str, object], said: list[str]) -> None:
    assert broken(GOOD | change) == said
