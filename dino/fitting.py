"""How many micro-batches fit into memory: found by trying them, each in a process of its own, not by a formula.

An own process, because the one that ran out is no measure any more: its libraries may go on failing (oneDNN does); and
what needs far too much is killed by the system without a word.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dino.config import PretrainConfig
from dino.distributed import World
from dino.images import ImageTable
from dino.precision import NAMES
from dino.pretrain import Interrupted, pretrain
from dino.training_state import TrainingState

TRIAL_SECONDS = 300.0
STEPS = 5  # the second has the optimizer's moments too; later ones use what earlier ones left in pieces


def larger_micro_batches(config: PretrainConfig, ranks: int) -> Iterator[int]:
    """Larger values of micro_batches that divide a rank's share of the batch, each at least twice the one before."""
    share, last = config.batch // ranks, config.micro_batches
    for parts in range(last + 1, share + 1):
        if share % parts == 0 and (parts >= 2 * last or parts == share):
            last = parts
            yield parts


def fitting_micro_batches(
    config: PretrainConfig, table: Path, ranks: int, *, beside: str = "dino"
) -> tuple[int | None, list[int]]:
    """The smallest larger number of micro-batches that fits, None if none does; and those that were tried.

    Args:
        config: What did not fit, its precision resolved.
        table: File of the training images.
        ranks: Processes that share the batch; a trial has the share of one.
        beside: A module that the training's process has imported: what it takes is missing in a trial too.
    """
    tried = []
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    packages = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    for parts in larger_micro_batches(config, ranks):
        tried.append(parts)
        share = replace(config, batch=config.batch // ranks, micro_batches=parts)
        command = [sys.executable, "-m", "dino.fitting", json.dumps(asdict(share)), str(table), beside]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                env={**outside, "PYTHONPATH": packages},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TRIAL_SECONDS,
            )
            if done.returncode == 0:
                return parts, tried
    return None, tried


def try_steps(config: PretrainConfig, table: Path) -> None:
    """Some steps of a training and the copies that a save makes; fails where there is no memory for them."""
    asked = iter(range(1, STEPS + 1))
    with World.start() as world, suppress(Interrupted):
        pretrain(
            config,
            ImageTable(table),
            world=world,
            precision=NAMES[config.precision],
            save=_copy,
            should_stop=lambda: next(asked) == STEPS,
        )


def _copy(state: TrainingState) -> None:
    """What a save takes beside the state itself: it is read back."""
    copies = [tensor.clone() for tensor in state.tensors.values()]
    copies.clear()


def main() -> None:
    """Try the settings that the command line holds as JSON."""
    settings: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(sys.argv[1]).items()}
    importlib.import_module(sys.argv[3])
    try_steps(PretrainConfig(**settings), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
