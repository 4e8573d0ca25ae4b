"""`python -m benchmarks.save [--arch vit_small ...]`: what saving the resumable state costs, beside a training's time.

Builds the networks of params.yaml (or of the options) with an optimizer's moments, and saves that state again and again
as the pretraining stage does: copied to the CPU, written, flushed to the disk, read back, renamed. One JSON line:
seconds of a save (median, least, most), and the share of the time that these saves take at the default interval.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from dino.config import PretrainConfig
from dino.networks import build_dino
from dino.training_state import capture
from pipelines import params
from pipelines.training.resumable import Resumable
from pipelines.training.save_clock import MAX_SHARE

PAPER = {"patch_size": 16, "global_px": 224, "local_px": 96, "hidden_dim": 2048, "bottleneck_dim": 256}
SIZES = ("embed_dim", "depth", "num_heads")  # null: the named size's own


def measure(config: PretrainConfig, saves: int, minutes: float) -> dict[str, object]:
    """Save a state of this training so many times, below .work/ of a folder on the disk of the current directory."""
    dino = build_dino(config, channels=3)
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {
        parameter: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
        for parameter in dino.student.parameters()
        if parameter.requires_grad
    }
    optimizer = torch.optim.AdamW(dino.student.parameters())
    optimizer.state.update(moments)
    copies, writes = [], []
    with tempfile.TemporaryDirectory(prefix=".save-", dir=".") as folder:
        os.environ["DINO_ROOT"] = folder
        with Resumable("0" * 16, {}) as resumable:
            for step in range(saves):
                began = time.perf_counter()
                state = capture(step, [], dino, optimizer, torch.zeros(1, config.out_dim), torch.zeros(()))
                copies.append(time.perf_counter() - began)
                resumable.save(state)
                writes.append(time.perf_counter() - began - copies[-1])
            size = resumable.newest.stat().st_size
    seconds = [copy + write for copy, write in zip(copies, writes, strict=True)]
    intervals = [max(60 * minutes, cost / MAX_SHARE) for cost in seconds]
    return {
        "arch": config.arch,
        "out_dim": config.out_dim,
        "state_bytes": size,
        "saves": saves,
        "save_s": round(statistics.median(seconds), 4),
        "save_s_least": round(min(seconds), 4),
        "save_s_most": round(max(seconds), 4),
        "copy_s": round(statistics.median(copies), 4),
        "interval_s": round(statistics.median(intervals), 1),
        "share_percent": round(100 * sum(seconds) / sum(intervals), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in the repository of the current directory."""
    settings = params.load()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save", description="What saving costs")
    parser.add_argument(
        "--arch", help="a named size with its own width, depth and heads; default: params.yaml's network"
    )
    parser.add_argument("--out-dim", type=int)
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args(arguments)
    chosen = asdict(settings.pretrain)
    if options.arch:
        chosen |= {"arch": options.arch, **dict.fromkeys(SIZES), **PAPER}
    if options.out_dim:
        chosen |= {"out_dim": options.out_dim}
    minutes = settings.runtime.pretrain.save_minutes
    if minutes is None:
        parser.error("runtime.pretrain.save_minutes is null in params.yaml: there is no interval to compare with")
    print(json.dumps(measure(PretrainConfig(**chosen), options.saves, minutes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
