"""What k-NN and probe share: each kind of features judged by the same code, settings chosen on val, test read once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from dino.distributed import World
from dino.intervals import wilson_interval
from pipelines import tracking
from pipelines.feature_file import read_features, read_key, refuse_mixed
from pipelines.labelled import LabelledRows, Labels
from pipelines.params import Params

KINDS = ("trained", "untrained", "pixels")


@dataclass(frozen=True)
class Judged:
    """What one kind of features came to.

    Attributes:
        val_top1: of the chosen setting.
        chosen: name and value of each setting that was chosen on val.
        predicted_M, actual_M: labels of the test images, int64.
        more: further entries of the metrics file.
    """

    val_top1: float
    chosen: Mapping[str, float]
    predicted_M: torch.Tensor
    actual_M: torch.Tensor
    more: Mapping[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """Its entry in the metrics file."""
        right, count = int((self.predicted_M == self.actual_M).sum()), len(self.actual_M)
        low, high = wilson_interval(right, count)
        scores = {"val_top1": self.val_top1, "test_top1": right / count}
        return {**scores, "test_top1_low": low, "test_top1_high": high, **self.chosen, **self.more}


Judge = Callable[[str, Mapping[str, LabelledRows]], Judged]  # kind, rows of train, val and test


def evaluate(
    stage: str, params: Params, world: World, judge: Judge, *, protocol: str
) -> tuple[Labels, dict[str, Judged]]:
    """Judge every kind, write metrics/STAGE.json and MLflow's row on the main rank, say how it came out.

    Without labels nothing is judged, and the file says why.

    Raises:
        ValueError: features are missing, or of other images than the labels.
    """
    labels = Labels.read()
    refuse_mixed()
    judged: dict[str, Judged] = {}
    metrics: dict[str, Any] = {"skipped": labels.why_not()}
    if not metrics["skipped"]:
        for kind in KINDS:
            rows = labels.join(read_features(kind))
            judged[kind] = judge(kind, {split: part.to(evaluation_device(world)) for split, part in rows.items()})
        metrics = {kind: result.metrics() for kind, result in judged.items()} | {"protocol": protocol}
    if world.is_main:
        tracking.evaluation(read_key("trained"), stage, metrics, params=params)
        say(stage, f"left out: {metrics['skipped']}" if "skipped" in metrics else str(table(metrics)))
    return labels, judged


def evaluation_device(world: World) -> torch.device:
    """The rank's GPU if it has one of CUDA's; Apple's are not worth their rarer operations here."""
    return world.device if world.device.type == "cuda" else torch.device("cpu")


def best(val: Mapping[Any, float]) -> Any:
    """The setting with the highest score on val; of equals the first."""
    return max(val, key=lambda setting: val[setting])


def table(metrics: Mapping[str, Any]) -> str:
    """Scores of each kind, in percent, as lines."""
    rows = pd.DataFrame({kind: metrics[kind] for kind in KINDS}).T
    names = ["val_top1", "test_top1", "test_top1_low", "test_top1_high"]
    chosen = [name for name in rows.columns if name not in names and not isinstance(rows[name].iloc[0], Mapping | list)]
    percent = (100 * rows[names].astype(float)).map("{:.2f}".format)
    shown = percent.join(rows[chosen].map("{:g}".format))
    return "\n" + shown.to_string()


def say(stage: str, line: str) -> None:
    """One thing to tell."""
    print(f"{stage}: {line}", flush=True)


def warn(stage: str, lines: Iterable[str]) -> None:
    """Warnings, a line each."""
    for line in lines:
        say(stage, f"warning: {line}")
