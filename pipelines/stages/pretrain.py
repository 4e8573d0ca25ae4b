"""Stage pretrain: DINO self-distillation on the prepared training images."""

import csv
import gc
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from dino.config import PretrainConfig
from dino.curve import CURVE_COLUMNS, run_length
from dino.distributed import World
from dino.files import whole_file
from dino.fitting import fitting_micro_batches
from dino.health import diagnose
from dino.images import ImageTable
from dino.networks import backbone_arch
from dino.precision import NAMES
from dino.pretrain import Interrupted, pretrain
from dino.snapshots import Snapshots, kept_epochs, teacher_backbone
from dino.training_state import TrainingState, save_state
from dino.weights import digest
from pipelines import paths
from pipelines.params import Params
from pipelines.processes.ending import StopRequest
from pipelines.processes.progress import progress
from pipelines.processes.shortage import MemoryShortError, in_short, lacks_memory
from pipelines.processes.stage import Requeue, run_stage
from pipelines.rows import tracking
from pipelines.training import doctor
from pipelines.training.crop_sheet import crop_sheet
from pipelines.training.intent import resolve
from pipelines.training.pace import Pace
from pipelines.training.resumable import Resumable, environment
from pipelines.training.save_clock import SaveClock

LAST_VALUES = ("teacher_entropy", "batch_entropy", "information", "kl", "feature_std", "rank_me")


def main(params: Params) -> None:
    """Train, resuming where a run of the same KEY was interrupted, and write snapshots, state, curve and metrics."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable products on CUDA, set before its start
    table = ImageTable(paths.TRAIN_IMAGES)
    with World.start() as world:
        config, key = resolve(params.pretrain, table, world.device)
        resumable = Resumable(
            key,
            environment(world.size, world.device),
            about={"params": asdict(config), "total_steps": run_length(config, len(table))[1]},
            writes=world.is_main,
            wait_minutes=params.runtime.wait_for_lock_minutes,
        )
        with resumable, tracking.pretraining(params, key, resolved=asdict(config)) as tracker:
            stop = StopRequest()
            often = params.runtime.pretrain
            clock = SaveClock(often.save_minutes, often.save_steps, lambda: resumable.saved_at)
            due = clock if world.is_main else lambda: False  # one rank's word is enough, and each has its own clock
            facts = describe(config, table, key)
            snapshots = Snapshots(resumable.folder, facts, run_length(config, len(table))[0])
            final, lost = train(config, table, world, resumable, snapshots, tracker, should_save=due, should_stop=stop)
            if world.is_main:
                snapshots.publish(paths.SNAPSHOTS, [epoch for epoch in kept_epochs(config) if epoch not in lost])
                save_state(paths.TRAINING_STATE, final, facts)
                bit_exact = resumable.bit_exact and config.deterministic
                write_results(config, table, final, facts, lost, bit_exact)


def describe(config: PretrainConfig, table: ImageTable, key: str) -> dict[str, Any]:
    """Facts of every checkpoint of this training; nothing in them varies from run to run."""
    return {
        "arch": backbone_arch(config, table.channels),
        "seed": config.seed,
        "initial_weights_md5": digest(config.initial_weights),
        "channels": table.channels,
        "mean": table.mean,
        "std": table.std,
        "params": asdict(config),
        "data_md5": table.digest(),
        "key": key,
    }


def train(
    config: PretrainConfig,
    table: ImageTable,
    world: World,
    resumable: Resumable,
    snapshots: Snapshots,
    tracker: tracking.Tracker,
    *,
    should_save: Callable[[], bool],
    should_stop: Callable[[], bool],
) -> tuple[TrainingState, Sequence[int]]:
    """The final state, and epochs whose snapshots are lost; the main rank tells how it goes.

    Raises:
        Requeue: should_stop said so; the state is saved.
    """
    if not world.is_main:
        world.barrier()  # until the main rank has put damaged states aside
    state = resumable.load()
    if world.is_main:
        world.barrier()
    _, total_steps = run_length(config, len(table))
    first = state.step if state else 0
    refuse_different_states(world, first)
    lost = snapshots.check(kept_epochs(config), state.step, state.tensors) if state and world.is_main else {}
    images = (total_steps - first) * config.batch
    if world.is_main:
        print(
            f"pretrain: {len(table):,} images, {config.epochs} epochs, {total_steps:,} steps of {config.batch} on "
            f"{world.device.type} in {config.precision}, key {snapshots.facts['key']}"
            + (f"; resuming after step {first:,}" if first else ""),
            flush=True,
        )
    for epoch, problem in lost.items():
        print(
            f"pretrain: the snapshot of epoch {epoch} is lost ({problem}) and left out; only a training from the "
            f"start makes it again: remove {resumable.folder} to have one",
            file=sys.stderr,
        )
    with progress("pretrain:", images) if world.is_main else nullcontext(lambda more, note="": None) as advance:
        pace = Pace()

        def say(words: str) -> None:
            if world.is_main:
                print(f"pretrain: {words}", flush=True)

        attending = doctor.Doctor(
            doctor.yardstick_of(config, snapshots.facts["arch"]),
            state.curve if state else [],
            say,
            tag=lambda name: tracker.tag({"health": name}),
        )

        def report(step: int, point: dict[str, float]) -> None:
            pace.images += config.batch
            if point:
                state_now = attending.look(point).state
                advance(config.batch, f"loss {point['loss']:.3f}, {state_now.name}{pace.note()}")
                tracker.log_curve_points([(step, {**point, **pace.numbers()})])
            else:
                advance(config.batch)

        short = ""
        try:
            final = pretrain(
                config,
                table,
                world=world,
                precision=NAMES[config.precision],
                state=state,
                report=report,
                say=say,
                snapshot=snapshots.save if world.is_main else lambda epoch, backbone: None,
                save=resumable.save,
                should_save=should_save,
                should_stop=should_stop,
                waited=pace.waited,
            )
        except Interrupted as stopped:
            raise Requeue(f"{stopped}; its state is saved, run the same command again to go on") from None
        except FloatingPointError as diverged:
            raise FloatingPointError(
                f"{diverged} The last good save stays, but from it the same settings come to the same end: change them"
            ) from diverged
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            short = in_short(error)
    if short:
        raise MemoryShortError(f"out of memory ({short}): {what_fits(config, table, world)}")
    if first < total_steps:
        if world.is_main:
            print(f"pretrain: {pace.verdict()}", flush=True)
        resumable.save(final)  # a lost lock, or DVC killed before it recorded the outs, then costs seconds
    return final, [*lost]


def what_fits(config: PretrainConfig, table: ImageTable, world: World) -> str:
    """What to lower, and to what; tried, when all that the training held is freed."""
    gc.collect()
    torch.cuda.empty_cache()
    print("pretrain: out of memory; trying what fits ...", file=sys.stderr, flush=True)
    fits, tried = fitting_micro_batches(config, table.path, world.size, beside="pipelines.stages.pretrain")
    if fits:
        return (
            f"set pretrain.micro_batches to {fits} (now {config.micro_batches}): some steps and a save with it were "
            "tried just now, in the memory that is free now"
        )
    numbers = f"with {', '.join(map(str, tried))} does not fit either (tried)" if tried else "can't be raised"
    return (
        f"pretrain.micro_batches {numbers}: lower pretrain.global_px, embed_dim, depth or out_dim, or free memory; the "
        "last save stays"
    )


def refuse_different_states(world: World, step: int) -> None:
    """All ranks go on from one state.

    Raises:
        ValueError: They found states of different steps.
    """
    steps = world.gather_rows(torch.tensor([step])).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the ranks found saved states of different steps ({', '.join(map(str, steps))}): {paths.work_dir()} must "
            "be one folder that every machine sees; the environment variable DINO_ROOT names its parent"
        )


def write_results(
    config: PretrainConfig,
    table: ImageTable,
    final: TrainingState,
    facts: Mapping[str, Any],
    snapshots_lost: Sequence[int],
    bit_exact: bool,
) -> None:
    """What DVC keeps of a training to look at; nothing in it varies from run to run."""
    write_curve(final.curve)
    crop_sheet(table, config, paths.CROPS_PICTURE)
    yardstick = doctor.yardstick_of(config, facts["arch"])
    found = diagnose(final.curve, yardstick)
    steps_per_epoch, total_steps = run_length(config, len(table))
    last_epoch = [point for point in final.curve if point["step"] > total_steps - steps_per_epoch]
    last = final.curve[-1]
    tracking.write_metrics(
        paths.PRETRAIN_METRICS,
        {
            "loss": sum(point["loss"] for point in last_epoch) / len(last_epoch),
            "prototypes_log": math.log(config.out_dim),
            **{name: last[name] for name in LAST_VALUES},
            "health": doctor.facts(found, yardstick),
            "epochs": config.epochs,
            "steps": total_steps,
            "images_seen": total_steps * config.batch,
            "parameters": sum(tensor.numel() for tensor in teacher_backbone(final.tensors).values()),
            "precision": config.precision,
            "initial_weights": config.initial_weights if facts["initial_weights_md5"] else None,
            "key": facts["key"],
            "bit_exact": bit_exact,
            "snapshots_lost": list(snapshots_lost),
        },
    )
    print(f"pretrain: {found.state.name} since epoch {found.since_epoch:.1f}. {doctor.told(found)}")


def write_curve(curve: list[dict[str, float]]) -> None:
    """The curve as DVC's plots read it."""
    with whole_file(paths.PRETRAIN_CURVES) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=CURVE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


if __name__ == "__main__":
    run_stage("pretrain", main, shared=True)
