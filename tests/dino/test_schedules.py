"""Schedules against the reference's arrays, and their corners."""

import numpy as np
import pytest

from dino import schedules


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_golden_schedules(golden, name: str) -> None:
    reference = golden("schedules")
    c = reference.config
    base, final, warmup_epochs = c[name]
    per_epoch = c["steps_per_epoch"]
    total = c["epochs"] * per_epoch
    found = [
        schedules.cosine(s, base=base, final=final, total_steps=total, warmup_steps=warmup_epochs * per_epoch)
        for s in range(total)
    ]
    np.testing.assert_allclose(found, reference[name].numpy(), rtol=0, atol=1e-12)


def test_golden_teacher_temperatures(golden) -> None:
    reference = golden("loss")
    c = reference.config
    found = [
        schedules.teacher_temperature(
            epoch,
            start=c["warmup_teacher_temp"],
            final=c["teacher_temp"],
            warmup_epochs=c["warmup_teacher_temp_epochs"],
        )
        for epoch in range(c["epochs"])
    ]
    np.testing.assert_allclose(found, reference["teacher_temperature_per_epoch"].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 9, 10])
def test_corners_of_the_warmup_are_numpys_linspace(warmup: int) -> None:
    found = [schedules.cosine(s, base=2.0, final=0.5, total_steps=10, warmup_steps=warmup) for s in range(10)]
    rest = np.arange(10 - warmup)
    expected = np.concatenate(
        [np.linspace(0, 2.0, warmup), 0.5 + 0.75 * (1 + np.cos(np.pi * rest / max(len(rest), 1)))]
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_corners_of_the_teacher_temperature(warmup: int) -> None:
    found = [schedules.teacher_temperature(e, start=0.04, final=0.07, warmup_epochs=warmup) for e in range(6)]
    expected = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(6 - warmup, 0.07)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
