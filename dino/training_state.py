"""Everything a training needs to go on: student, teacher, heads, optimizer, centre, step, and its curve so far."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.checkpoint import STATE_FORMAT, load_tensors, save_tensors
from dino.model import DINO


@dataclass(frozen=True)
class TrainingState:
    """A training between two steps; draws are functions of the step, so no generator state belongs to it.

    Attributes:
        step: Optimizer steps done.
        tensors: student.*, teacher.*, optimizer.<moment>.<parameter>, center [1, K], loss_sum.
        curve: The points reported so far.
    """

    step: int
    tensors: dict[str, Tensor]
    curve: list[dict[str, float]]


def capture(
    step: int,
    curve: list[dict[str, float]],
    dino: DINO,
    optimizer: torch.optim.Optimizer,
    center: Tensor,
    loss_sum: Tensor,
) -> TrainingState:
    """Copy the live training to the CPU."""
    tensors = {"center": center, "loss_sum": loss_sum}
    tensors |= {f"student.{name}": tensor for name, tensor in dino.student.state_dict().items()}
    tensors |= {f"teacher.{name}": tensor for name, tensor in dino.teacher.state_dict().items()}
    for name, parameter in dino.student.named_parameters():
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{moment}.{name}"] = tensor
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    return TrainingState(step, copies, list(curve))


def restore(state: TrainingState, dino: DINO, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """Put a state into freshly built networks and optimizer; returns centre and loss_sum on their device."""
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "optimizer": {}}
    for name, tensor in state.tensors.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
    dino.student.load_state_dict(parts["student"])
    dino.teacher.load_state_dict(parts["teacher"])
    parameters = dict(dino.student.named_parameters())
    for name, tensor in parts["optimizer"].items():
        moment, _, parameter_name = name.partition(".")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][moment] = tensor.to(parameter.device, copy=True)
    device = next(dino.student.parameters()).device
    return state.tensors["center"].to(device), state.tensors["loss_sum"].to(device)


def save_state(path: str | Path, state: TrainingState, facts: dict[str, Any]) -> None:
    """Write the state as a checkpoint with these facts beside it."""
    content = {**facts, "format": STATE_FORMAT, "step": state.step, "curve": state.curve}
    save_tensors(path, state.tensors, content)


def load_state(path: str | Path) -> tuple[TrainingState, dict[str, Any]]:
    """The state and the facts saved beside it.

    Raises:
        ValueError: No such file, no training state, or a damaged one.
    """
    tensors, facts = load_tensors(path)
    if facts.pop("format", None) != STATE_FORMAT:
        raise ValueError(f"{path} is no training state")
    step, curve = facts.pop("step", None), facts.pop("curve", None)
    if type(step) is not int or step < 0 or not isinstance(curve, list) or not all(map(_is_point, curve)):
        raise ValueError(f"{path} is no training state: its step is {step!r}, or its curve is damaged")
    return TrainingState(step, tensors, curve), facts


def _is_point(point: Any) -> bool:
    return isinstance(point, dict) and "step" in point and all(isinstance(x, int | float) for x in point.values())
