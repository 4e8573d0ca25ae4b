"""What a training starts from when it is given weights: a state before its first step."""

from pathlib import Path

import torch

from dino.config import PretrainConfig
from dino.model import DINO
from dino.networks import build_dino
from dino.training_state import TrainingState
from dino.weights import Tensors, Weights, fitting_backbone, read_weights


def initial_state(config: PretrainConfig, channels: int) -> tuple[TrainingState, str]:
    """The state before step 0 of a training that starts from config.initial_weights, and in words what was taken.

    Backbones must fit; heads are taken where the file has both and they fit, and stay random otherwise. Schedules,
    optimizer and order of images begin anew.

    Raises:
        ValueError: A file that cannot be read, or backbones of another architecture.
    """
    path = Path(config.initial_weights)
    weights, dino = read_weights(path), build_dino(config, channels)
    heads = fitting_heads(weights, dino)
    for network, found in ((dino.student, weights.student), (dino.teacher, weights.teacher)):
        network.backbone.load_state_dict(fitting_backbone(found, network.backbone, str(path)))
    center = torch.zeros(1, config.out_dim)
    if isinstance(heads, str):
        said = f"backbones from {path}, heads random ({heads})"
    else:
        dino.student.head.load_state_dict(heads[0])
        dino.teacher.head.load_state_dict(heads[1])
        said = f"backbones and heads from {path}"
        if weights.center is not None and weights.center.shape == center.shape:
            center = weights.center.float()
            said += ", and the centre"
    tensors = {f"student.{name}": tensor for name, tensor in dino.student.state_dict().items()}
    tensors |= {f"teacher.{name}": tensor for name, tensor in dino.teacher.state_dict().items()}
    return TrainingState(0, tensors | {"center": center, "loss_sum": torch.zeros(())}, []), said


def fitting_heads(weights: Weights, dino: DINO) -> tuple[Tensors, Tensors] | str:
    """State dicts of both heads, or why there are none."""
    heads = []
    for found, network in ((weights.student, dino.student), (weights.teacher, dino.teacher)):
        head = {name.removeprefix("head."): t for name, t in found.items() if name.startswith("head.")}
        expected = network.head.state_dict()
        if not head:
            return "the file has none"
        for name in (*expected, *head):
            if name not in head or name not in expected or head[name].shape != expected[name].shape:
                sizes = [list(x[name].shape) if name in x else "missing" for x in (head, expected)]
                return f"the file's do not fit: {name} is {sizes[0]} there, {sizes[1]} here"
        heads.append(head)
    return heads[0], heads[1]
