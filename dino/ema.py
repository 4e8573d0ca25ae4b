"""Momentum teacher (paper section 3.1): teacher <- m teacher + (1 - m) student."""

import torch
from torch import nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's; buffers (BatchNorm statistics) stay the teacher's own.

    Raises:
        ValueError: momentum outside [0, 1].
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"EMA momentum is {momentum}; it must lie in [0, 1], for example 0.996")
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
