"""What one rank computes, alone or beside others."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tiny import SETTINGS, STEPS_PER_EPOCH

from dino.batch_norm import share_batch_norms
from dino.config import PretrainConfig
from dino.distributed import World
from dino.images import ImageTable
from dino.networks import build_dino
from dino.optimizer import build_optimizer
from dino.pretrain import Interrupted, make_micro_batches, pretrain, step_settings, train_step
from dino.training_state import TrainingState, load_state, save_state

CONFIG = PretrainConfig(**SETTINGS)
CONVNET = dataclasses.replace(  # BatchNorm in backbone and head; crops large enough for statistics of many values
    CONFIG, arch="shufflenet_v2_x0_5", drop_path_rate=0.0, head_batch_norm=True, global_px=32, local_px=24,
    optimizer="sgd", lr_at_256=0.1,
)  # fmt: skip
FEW_STEPS, STOP_AFTER = 5, 3  # past the warm-up and the freezing; before


def few_steps(
    table: ImageTable, world: World, dtype: torch.dtype, config: PretrainConfig = CONFIG, steps: int = FEW_STEPS
) -> dict[str, Any]:
    """Steps through the public train_step in this dtype: this rank's crops of the first, losses, centre, weights."""
    dino = build_dino(config, table.channels).to(dtype)
    share_batch_norms(dino, world)
    optimizer = build_optimizer(dino.student, config.optimizer)
    center, losses, first_crops = torch.zeros(1, config.out_dim, dtype=dtype), [], []
    for step in range(steps):
        batch_rows = torch.tensor(world.rows(config.batch))
        images = table.batch((config.batch * step + batch_rows).tolist())
        made = make_micro_batches(config, config.depth or 0, step, images, batch_rows, table, world.device)
        first_crops = first_crops or made[0][0]
        parts = [([crop.to(dtype) for crop in crops], drawn) for crops, drawn in made]
        settings = step_settings(config, step, STEPS_PER_EPOCH)
        result = train_step(dino, optimizer, center, parts, settings, config, world)
        center = result.center
        losses.append(result.loss)
    return {"crops": first_crops, "losses": torch.stack(losses), "center": center, "weights": dino.state_dict()}


def whole_run(table: ImageTable, world: World, folder: Path) -> dict[str, Any]:
    """A run that nobody stops, and one that only the last rank is asked to stop, resumed from the main rank's file."""
    final = pretrain(CONFIG, table, world=world, precision=torch.float32)
    steps, file = [], folder / "state.safetensors"

    def save(state: TrainingState) -> None:
        steps.append(state.step)
        if world.is_main:
            save_state(file, state, {})

    asked = iter(range(1, 1000))
    try:
        pretrain(
            CONFIG,
            table,
            world=world,
            precision=torch.float32,
            save=save,
            should_save=lambda: world.is_main and not steps,  # once, after the first step
            should_stop=lambda: next(asked) == STOP_AFTER and world.rank == world.size - 1,
        )
    except Interrupted as stopped:
        reason = str(stopped)
    resumed = pretrain(CONFIG, table, world=world, precision=torch.float32, state=load_state(file)[0])
    return {"final": dataclasses.asdict(final), "resumed": dataclasses.asdict(resumed), "saved": steps, "said": reason}


def steps_of(world: World, table: ImageTable) -> dict[str, Any]:
    """Steps that one process and ranks can both take."""
    return {
        "float64": few_steps(table, world, torch.float64),
        "float32": few_steps(table, world, torch.float32, steps=1),  # further on, rounding decides
        "convnet": few_steps(table, world, torch.float64, CONVNET, steps=3),  # the first one's rate is 0
    }


def compute(world: World, table: ImageTable, folder: Path) -> dict[str, Any]:
    """All that this rank is asked for."""
    one_epoch = dataclasses.replace(CONFIG, head_batch_norm=True, epochs=1, teacher_temp_warmup_epochs=0)
    return steps_of(world, table) | {
        "batch_norm": pretrain(one_epoch, table, world=world, precision=torch.float32).tensors,
        "run": whole_run(table, world, folder),
    }
