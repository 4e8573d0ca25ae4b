"""Schedules as pure functions of the step (paper section 4 and appendix; the reference's formulas)."""

import math


def cosine(step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Linear from 0 to `base` over the warm-up (its first value is 0, its last is base), then a cosine to `final`."""
    if step < warmup_steps:
        return base * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))


def teacher_temperature(epoch: int, *, start: float, final: float, warmup_epochs: int) -> float:
    """Linear over the warm-up epochs (first value start, last value final), then constant."""
    if epoch >= warmup_epochs:
        return final
    return start + (final - start) * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else start
