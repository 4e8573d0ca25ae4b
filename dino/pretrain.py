"""Pretraining: THE loop, and one step of it (paper section 3.1, algorithm 1).

Legend: B images of the global batch, V views, K prototypes. Shapes of rows follow the ranks: each takes its share.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dino import draws
from dino.ahead import ahead
from dino.augment import multi_crop
from dino.batch_norm import share_batch_norms
from dino.config import RANDOM_WEIGHTS, PretrainConfig
from dino.curve import Curve, StepResult, run_length
from dino.distributed import World
from dino.images import ImageBatch, ImageTable
from dino.initial import initial_state
from dino.loss import dino_loss
from dino.model import DINO
from dino.networks import build_dino
from dino.optimizer import build_optimizer, clip_each_gradient, freeze_last_layer, set_schedule
from dino.schedules import cosine, teacher_temperature
from dino.snapshots import kept_epochs
from dino.training_state import TrainingState, capture, restore

MicroBatch = tuple[list[Tensor], list[Tensor | None]]  # crops, and each crop's draws of stochastic depth


class Interrupted(Exception):  # noqa: N818 (no error: asked to stop, state saved)
    """Asked to stop; the state is saved and the same call goes on from there."""


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temp: float
    freeze_last_layer: bool


def step_settings(config: PretrainConfig, step: int, steps_per_epoch: int) -> StepSettings:
    """The schedules as a pure function of the step."""
    total = config.epochs * steps_per_epoch
    warmup = int(config.warmup_epochs * steps_per_epoch)
    return StepSettings(
        lr=cosine(step, base=config.lr_peak, final=config.lr_final, total_steps=total, warmup_steps=warmup),
        weight_decay=cosine(step, base=config.weight_decay, final=config.weight_decay_final, total_steps=total),
        ema_momentum=cosine(step, base=config.ema_momentum, final=1.0, total_steps=total),
        teacher_temp=teacher_temperature(
            step // steps_per_epoch,
            start=config.teacher_temp_start,
            final=config.teacher_temp,
            warmup_epochs=config.teacher_temp_warmup_epochs,
        ),
        freeze_last_layer=step < config.freeze_last_layer_epochs * steps_per_epoch,
    )


def train_step(
    dino: DINO,
    optimizer: torch.optim.Optimizer,
    center: Tensor,
    micro_batches: Sequence[MicroBatch],
    settings: StepSettings,
    config: PretrainConfig,
    world: World,
    precision: torch.dtype = torch.float32,
) -> StepResult:
    """One optimizer step: forward and backward of each micro-batch with the old centre, then everything moves once.

    Args:
        dino: Student and teacher; changed.
        optimizer: Of the student's parameters; changed.
        center: [1, K]; not changed.
        micro_batches: Crops of this rank's share, each with the draws of stochastic depth of each crop; equal sizes.
        settings: The schedules' values.
        config: Temperatures, clipping.
        world: Ranks, which average gradients, centre and loss in one all-reduce.
        precision: Of the matrix products; softmaxes and weights stay in their own.
    """
    set_schedule(optimizer, settings.lr, settings.weight_decay)
    optimizer.zero_grad(set_to_none=True)
    losses, centers, teacher_outs = [], [], []
    for crops, drop_path_draws in micro_batches:
        with torch.autocast(crops[0].device.type, dtype=precision, enabled=precision == torch.bfloat16):
            student_out, teacher_out = dino(crops, drop_path_draws)
            loss, moved_center = dino_loss(
                student_out,
                teacher_out,
                center,
                student_temp=config.student_temp,
                teacher_temp=settings.teacher_temp,
                center_momentum=config.center_momentum,
            )
        (loss / len(micro_batches)).backward()
        losses.append(loss.detach())
        centers.append(moved_center)
        teacher_outs.append(teacher_out)
    loss, new_center = torch.stack(losses).mean(), torch.stack(centers).mean(dim=0)
    loss, new_center = average_over_ranks(world, dino.student.parameters(), loss, new_center)
    gradient_norms = clip_each_gradient(dino.student.parameters(), config.clip_norm)
    if settings.freeze_last_layer:
        freeze_last_layer(dino.student)
    optimizer.step()
    dino.update_teacher(settings.ema_momentum)
    return StepResult(loss, new_center, gradient_norms, teacher_outs)


def average_over_ranks(
    world: World, parameters: Iterator[torch.nn.Parameter], loss: Tensor, center: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean over ranks of gradients (in place), loss and centre: one all-reduce a step."""
    if world.size == 1:
        return loss, center
    gradients = [p.grad for p in parameters if p.grad is not None]
    tensors = [*gradients, center, loss]
    parts = world.mean(torch.cat([t.flatten() for t in tensors])).split([t.numel() for t in tensors])
    for gradient, part in zip(gradients, parts, strict=False):
        gradient.copy_(part.view_as(gradient))
    return parts[-1].view_as(loss), parts[-2].view_as(center)


def rows_of_steps(config: PretrainConfig, images: int, first: int, batch_rows: Tensor) -> Iterator[list[int]]:
    """Rows of the table that this rank sees at each step from `first` to the last.

    Args:
        config: Of batch, epochs and seed.
        images: In the table.
        first: Step, from 0.
        batch_rows: This rank's rows of the global batch.
    """
    steps_per_epoch, total_steps = run_length(config, images)
    for step in range(first, total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step == first or step_of_epoch == 0:
            order = draws.epoch_order(config.seed, epoch, images)
        yield order[step_of_epoch * config.batch + batch_rows].tolist()


def drop_path_draws(config: PretrainConfig, depth: int, step: int, batch_rows: Tensor) -> list[Tensor | None]:
    """Draws of stochastic depth of each view, [depth, 2, B]; None where nothing is dropped."""
    if config.drop_path_rate == 0.0:
        return [None] * config.views
    return [
        draws.uniform(config.seed, draws.DROP_PATH + view, step, batch_rows, 2 * depth).T.reshape(depth, 2, -1)
        for view in range(config.views)
    ]


def make_micro_batches(
    config: PretrainConfig,
    depth: int,
    step: int,
    images: ImageBatch,
    batch_rows: Tensor,
    table: ImageTable,
    device: torch.device,
) -> list[MicroBatch]:
    """Crops, made on the training device, and draws of each micro-batch."""
    pixels = images.pixels_BCHW.to(device, non_blocking=True)
    micro_batches = []
    for part in torch.arange(len(batch_rows)).chunk(config.micro_batches):
        batch = ImageBatch(pixels[part[0] : part[-1] + 1], images.sizes_B2[part])
        crops = multi_crop(batch, config=config, step=step, rows=batch_rows[part], mean=table.mean, std=table.std)
        micro_batches.append((crops, drop_path_draws(config, depth, step, batch_rows[part])))
    return micro_batches


def first_features(dino: DINO, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """The teacher's features [B, D] of the first global crop of this rank's images, in eval mode, as it is judged."""
    backbone = dino.teacher.backbone.eval()
    features = [backbone(crops[0]) for crops, _ in micro_batches]
    backbone.train()  # as before: the looking leaves BatchNorm's statistics alone
    return torch.cat(features)


@contextmanager
def repeatable(deterministic: bool) -> Iterator[None]:
    """Only operations whose result repeats to the bit, while it lasts."""
    switches: Any = torch.utils.deterministic
    before, filled_before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    switches.fill_uninitialized_memory = False  # a net for operations that read what nobody wrote; none here does
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filled_before


def check_fits(config: PretrainConfig, images: int, world: World) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: Fewer images than a batch, or a batch that ranks and micro-batches do not divide.
    """
    if images < config.batch:
        raise ValueError(
            f"pretrain.batch is {config.batch}, but there are {images} training images: choose at most {images}"
        )
    if config.batch % (world.size * config.micro_batches):
        raise ValueError(
            f"pretrain.batch ({config.batch}) does not divide among {world.size} processes and "
            f"{config.micro_batches} micro_batches: choose a multiple of {world.size * config.micro_batches}"
        )


def pretrain(
    config: PretrainConfig,
    table: ImageTable,
    *,
    world: World,
    precision: torch.dtype,
    state: TrainingState | None = None,
    report: Callable[[int, dict[str, float]], None] = lambda step, point: None,
    say: Callable[[str], None] = lambda text: None,
    snapshot: Callable[[int, dict[str, Tensor]], None] = lambda epoch, backbone: None,
    save: Callable[[TrainingState], None] = lambda state: None,
    should_save: Callable[[], bool] = lambda: False,
    should_stop: Callable[[], bool] = lambda: False,
    waited: Callable[[float], None] = lambda seconds: None,
) -> TrainingState:
    """Train to the end and return the final state.

    Args:
        config: What chooses the result.
        table: The training images.
        world: Ranks and device.
        precision: Of the matrix products: torch.float32 or torch.bfloat16.
        state: A saved state to go on from; the result is the same to the bit as without the interruption.
        report: Called after each step, with a point of the curve at some and an empty dict at the others.
        snapshot: Called at the end of the epochs to keep with the teacher's backbone; copy what should last.
        save: Called with the state to keep; every rank calls it, the main one should write.
        should_save: Asked after each step; one rank's True is true for all.
        should_stop: Asked after each step, likewise; True saves and raises Interrupted.
        waited: Called before each step with the seconds that its images were late.

    Raises:
        ValueError: Settings that do not fit the data or the ranks.
        FloatingPointError: The training is no longer finite; what was saved before stays.
        Interrupted: should_stop said so.
    """
    check_fits(config, len(table), world)
    steps_per_epoch, total_steps = run_length(config, len(table))
    dino = build_dino(config, table.channels).to(world.device)
    share_batch_norms(dino, world)
    depth = len(getattr(dino.student.backbone, "blocks", ()))  # of a ViT; no other has stochastic depth
    optimizer = build_optimizer(dino.student, config.optimizer)
    step, points = 0, []
    center, loss_sum = torch.zeros(1, config.out_dim, device=world.device), torch.zeros((), device=world.device)
    if state is None and config.initial_weights != RANDOM_WEIGHTS:
        state, taken = initial_state(config, table.channels)
        say(f"begins with {taken}")
    if state is not None:
        step, points = state.step, state.curve
        center, loss_sum = restore(state, dino, optimizer)
    curve = Curve(config, len(table), points, step, loss_sum)
    if config.compile:
        dino.student.compile()
        dino.teacher.compile()

    batch_rows = torch.tensor(world.rows(config.batch))
    rows = rows_of_steps(config, len(table), step, batch_rows)
    with repeatable(config.deterministic), closing(ahead(table.batch, rows, waited=waited)) as batches:
        for images in batches:
            settings = step_settings(config, step, steps_per_epoch)
            parts = make_micro_batches(config, depth, step, images, batch_rows, table, world.device)
            result = train_step(dino, optimizer, center, parts, settings, config, world, precision)
            step += 1
            point = curve.add(step, result, center, vars(settings), partial(first_features, dino, parts), world)
            center = result.center
            report(step, point)
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if step_of_epoch == 0 and epoch in kept_epochs(config):
                backbone = dino.teacher.backbone.state_dict()
                curve.refuse_not_finite(backbone, step)
                snapshot(epoch, backbone)
            stop, keep = world.any(should_stop(), should_save())
            if stop or keep:
                kept = capture(step, curve.points, dino, optimizer, center, curve.loss_sum)
                curve.refuse_not_finite(kept.tensors, step)
                save(kept)
                world.barrier()  # a rank that ends makes torchrun end the others, which may still write
            if stop:
                raise Interrupted(f"stopped after step {step} of {total_steps}")
    final = capture(step, curve.points, dino, optimizer, center, curve.loss_sum)
    curve.refuse_not_finite(final.tensors, step)
    return final
