"""The curve of a training: what is looked at now and then and at each epoch's end, and what is no number any more.

Legend: B images of the global batch, D width of the features, K prototypes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dino.config import PretrainConfig
from dino.distributed import World
from dino.vital_signs import measure

SCHEDULES = ("lr", "weight_decay", "ema_momentum", "teacher_temp")
CURVE_COLUMNS = (
    *("step", "epoch", "loss", "kl", "teacher_entropy", "batch_entropy", "information", "feature_std", "rank_me"),
    "grad_norm",
    *SCHEDULES,
)
CURVE_POINTS = 400  # of a run of few epochs: enough to see everything, few enough to plot
MIN_CURVE_STEPS = 5  # a point each so many steps at least: reading numbers off a device makes it wait
CURE_OF_DIVERGENCE = (
    "Lower pretrain.lr_at_256, lengthen pretrain.warmup_epochs, keep pretrain.clip_norm at 3 or below, and use "
    "pretrain.precision fp32 below patch size 16."
)


@dataclass
class StepResult:
    """What a step leaves to look at; tensors on the device, nothing waited for."""

    loss: Tensor
    center: Tensor
    gradient_norms: Tensor
    teacher_out: list[Tensor]  # of each micro-batch


def run_length(config: PretrainConfig, images: int) -> tuple[int, int]:
    """Steps of an epoch (the remainder of images is dropped) and of the run."""
    steps_per_epoch = images // config.batch
    return steps_per_epoch, config.epochs * steps_per_epoch


def has_point(step: int, steps_per_epoch: int, total_steps: int) -> bool:
    """Whether the curve has a point after this many steps: evenly within each epoch, and at its end.

    Epochs of fewer than MIN_CURVE_STEPS steps share a point.
    """
    if step == total_steps:
        return True
    if steps_per_epoch < MIN_CURVE_STEPS:
        return step % (steps_per_epoch * math.ceil(MIN_CURVE_STEPS / steps_per_epoch)) == 0
    in_epoch = max(1, steps_per_epoch // max(MIN_CURVE_STEPS, total_steps // CURVE_POINTS))
    return step * in_epoch // steps_per_epoch > (step - 1) * in_epoch // steps_per_epoch


class Curve:
    """The points so far; between two of them sums stay on the device: looking at each loss would mean waiting.

    Attributes:
        points: Rows of CURVE_COLUMNS.
        loss_sum: Of the steps since the last point.
    """

    def __init__(
        self, config: PretrainConfig, images: int, points: Sequence[dict[str, float]], step: int, loss_sum: Tensor
    ) -> None:
        self.steps_per_epoch, self.total_steps = run_length(config, images)
        self.points, self.loss_sum = list(points), loss_sum
        self._finite_steps = torch.tensor(step, device=loss_sum.device)

    def add(
        self,
        step: int,
        result: StepResult,
        center: Tensor,
        schedules: Mapping[str, float],
        features_BD: Callable[[], Tensor],
        world: World,
    ) -> dict[str, float]:
        """Take in a step; its point, or an empty dict where the curve has none.

        Args:
            step: Steps done, this one too.
            result: What the step left.
            center: [1, K], the one that its loss used.
            schedules: Values of the step, SCHEDULES among them.
            features_BD: Makes the teacher's features of one global crop of this rank's images; asked for points only.
            world: Ranks, whose whole batch is looked at.

        Raises:
            FloatingPointError: The training is no longer finite.
        """
        self.loss_sum = self.loss_sum + result.loss
        self._finite_steps = self._finite_steps + self.loss_sum.isfinite()
        if not has_point(step, self.steps_per_epoch, self.total_steps):
            return {}
        before = self.points[-1]["step"] if self.points else 0
        signs = {"loss": self.loss_sum / (step - before), "grad_norm": result.gradient_norms.norm()}
        with torch.no_grad():
            features = world.gather_rows(features_BD())
        signs |= measure(torch.cat(result.teacher_out), center, schedules["teacher_temp"], features, world.mean)
        signs["kl"] = result.loss - signs["teacher_entropy"]
        values = torch.stack([value.double() for value in signs.values()]).tolist()  # here the device is waited for
        point = {"step": step, "epoch": step / self.steps_per_epoch}
        point |= dict(zip(signs, values, strict=True)) | {name: schedules[name] for name in SCHEDULES}
        self.refuse_not_finite(point, step)
        self.points.append(point)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return point

    def refuse_not_finite(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Stop a training that computes nothing any more.

        Args:
            values: Numbers to look at; of a tensor, all of them.
            step: Steps done.

        Raises:
            FloatingPointError: A value is NaN or infinite; the message names the step whose loss was the first.
        """
        totals = {name: float(value.sum()) if isinstance(value, Tensor) else value for name, value in values.items()}
        if bad := [name for name, total in totals.items() if not math.isfinite(total)]:
            first = min(step, int(self._finite_steps) + 1)
            raise FloatingPointError(f"step {first}: {', '.join(bad[:3])} not finite. {CURE_OF_DIVERGENCE}")
