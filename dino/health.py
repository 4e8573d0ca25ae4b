"""The collapse doctor: numbers of a step -> a named state and its remedy (paper section 5.3: the two collapses).

A loss says little: it rises in healthy trainings and stays at ln K in dead ones. What tells is how the teacher spreads
images over prototypes and how many directions the features use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.loss import teacher_probabilities

UNIFORM_SHARE = 0.98  # of ln K: a teacher that sharp says nothing about any image
ONE_PROTOTYPE_SHARE = 0.05  # of ln K: the batch's mean prediction sits on a handful of prototypes
LOW_RANK_SHARE = 0.04  # of the directions that a batch of this size can use
LOW_STD_SHARE = 0.1  # of 1 / sqrt(D), the std of features spread evenly over the sphere
MIN_ROWS = 8  # images of a batch; fewer say nothing about directions
WARMUP_SHARE = 0.1  # of the run: before, odd numbers are expected
DIVERGING_GROWTH = 1.5  # of the loss over the lowest so far, when it also exceeds ln K


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats along the last axis."""
    return torch.special.entr(probabilities).sum(dim=-1)


def rank_me(features_ND: Tensor) -> Tensor:
    """Effective number of directions: exp of the entropy of normalised singular values (RankMe, Garrido 2023)."""
    singular = torch.linalg.svdvals(features_ND.float().nan_to_num())  # the solver refuses NaN, feature_std shows it
    return torch.exp(entropy(singular / singular.sum().clamp(min=1e-12)))


@torch.no_grad()
def measure(
    teacher_out: Tensor,
    center: Tensor,
    teacher_temp: float,
    features_BD: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """Vital signs of a batch, scalars on its device.

    Args:
        teacher_out: [2 * B, K], or this rank's share of equal size.
        center: [1, K], the centre that the loss used.
        teacher_temp: The step's temperature.
        features_BD: The teacher backbone's features of one global view of the whole batch.
        mean_over_ranks: Makes one rank's mean that of all, so that the signs don't depend on how many there are.
    """
    probabilities = teacher_probabilities(teacher_out, center, teacher_temp)
    normalised = F.normalize(features_BD.float(), dim=-1)
    return {
        "teacher_entropy": mean_over_ranks(entropy(probabilities).mean()),
        "batch_entropy": entropy(mean_over_ranks(probabilities.mean(dim=0))),
        "feature_std": normalised.std(dim=0, correction=0).mean(),  # of a single image: 0, not NaN
        "rank_me": rank_me(normalised - normalised.mean(dim=0)),
    }


@dataclass(frozen=True)
class Diagnosis:
    """A named state, and in plain words what to do."""

    state: str
    advice: str


HEALTHY = Diagnosis("healthy", "Nothing to do.")
WARMING_UP = Diagnosis("warming up", "Too early to tell; look again after the warm-up.")
UNIFORM = Diagnosis(
    "uniform collapse",
    "The teacher's output is uniform: the loss stays at ln K and nothing is learned. Lower pretrain.teacher_temp_start "
    "and pretrain.teacher_temp (0.02 to 0.04), lower pretrain.out_dim, lengthen pretrain.warmup_epochs.",
)
ONE_HOT = Diagnosis(
    "one-hot collapse",
    "Every image falls on the same prototype: the centring does not keep up. Raise pretrain.teacher_temp, lower "
    "pretrain.center_momentum (0.9), lower pretrain.lr_at_256, keep pretrain.freeze_last_layer_epochs at 1 or more.",
)
DIMENSIONAL = Diagnosis(
    "dimensional collapse",
    "The features use only a few directions. Lower pretrain.lr_at_256, lengthen pretrain.warmup_epochs, use more or "
    "harder local crops, lower pretrain.weight_decay_final.",
)
DIVERGING = Diagnosis(
    "diverging",
    "The loss runs away. Lower pretrain.lr_at_256, lengthen pretrain.warmup_epochs, keep pretrain.clip_norm at 3 or "
    "below, and use pretrain.precision fp32 below patch size 16.",
)


def diagnose(points: list[dict[str, float]], *, prototypes: int, batch: int, width: int, total_steps: int) -> Diagnosis:
    """Name the state of a training from its curve so far.

    Args:
        points: Rows with step, loss, teacher_entropy, batch_entropy, feature_std, rank_me; the last one is now.
        prototypes: K.
        batch: Images of the whole batch, which feature_std and rank_me were measured on.
        width: D.
        total_steps: Length of the run.
    """
    now, top = points[-1], math.log(prototypes)
    if not math.isfinite(now["loss"]):
        return DIVERGING
    if now["step"] < WARMUP_SHARE * total_steps:
        return WARMING_UP
    lowest = min(point["loss"] for point in points)
    if now["loss"] > max(top, DIVERGING_GROWTH * lowest):
        return DIVERGING
    if now["teacher_entropy"] > UNIFORM_SHARE * top:
        return UNIFORM
    if now["batch_entropy"] < ONE_PROTOTYPE_SHARE * top:
        return ONE_HOT
    low_std = now["feature_std"] < LOW_STD_SHARE / math.sqrt(width)
    low_rank = now["rank_me"] < max(1.5, LOW_RANK_SHARE * min(batch, width))
    if batch >= MIN_ROWS and (low_std or low_rank):
        return DIMENSIONAL
    return HEALTHY
