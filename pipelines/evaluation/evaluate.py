"""What knn, probe and linear share: settings chosen on val, test read once, an interval beside every score."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch

from dino.distributed import World
from dino.intervals import wilson_interval
from pipelines.evaluation.feature_file import read_features, refuse_mixed
from pipelines.evaluation.labelled import LabelledRows, Labels
from pipelines.params import Params
from pipelines.rows import tracking

KINDS = ("trained", "untrained", "pixels")
SPLITS = ("val", "test")


class Score(NamedTuple):
    """Right answers of all."""

    right: int
    images: int

    @staticmethod
    def of(predicted_M: torch.Tensor, actual_M: torch.Tensor) -> "Score":
        """Of these labels."""
        return Score(int((predicted_M == actual_M).sum()), len(actual_M))

    def metrics(self) -> dict[str, float]:
        """The share, and its 95 % interval (Wilson's)."""
        low, high = wilson_interval(*self)
        return {"top1": self.right / self.images, "top1_low": low, "top1_high": high}


@dataclass(frozen=True)
class Judged:
    """What one kind of features came to.

    Attributes:
        chosen: name and value of each setting that was chosen on val.
        val: the score there.
        tried: scores on val by the values of a setting, e.g. {"k": {"5": ..., "10": ...}}.
        predicted_M, actual_M: labels of the test images, int64.
        diverged: settings that did, in words.
    """

    chosen: Mapping[str, float]
    val: Score
    tried: Mapping[str, Mapping[str, Score]]
    predicted_M: torch.Tensor
    actual_M: torch.Tensor
    diverged: Sequence[str] = ()

    def metrics(self) -> dict[str, Any]:
        """Its entry in the metrics file."""
        found: dict[str, Any] = {}
        for split, score in zip(SPLITS, (self.val, Score.of(self.predicted_M, self.actual_M)), strict=True):
            found |= {f"{split}_{name}": share for name, share in score.metrics().items()}
        for name, by_value in self.tried.items():
            found[f"val_by_{name}"] = {value: score.metrics() for value, score in by_value.items()}
        return found | dict(self.chosen) | ({"diverged": list(self.diverged)} if self.diverged else {})


def evaluate(
    stage: str,
    params: Params,
    world: World,
    judge: Callable[[Labels], Mapping[str, Judged]],
    *,
    key: str,
    protocol: str,
) -> tuple[Labels, Mapping[str, Judged]]:
    """Judge, write metrics/STAGE.json and MLflow's row on the main rank, say how it came out.

    Without labels nothing is judged, and the file says why.

    Args:
        stage: knn, probe or linear.
        params: all settings.
        world: the ranks that share the work.
        judge: gives what each kind of features came to, in the order of KINDS.
        key: of the checkpoint.
        protocol: what was done, in words, for the file.
    """
    labels = Labels.read()
    judged: Mapping[str, Judged] = {}
    metrics: dict[str, Any] = {"skipped": labels.why_not()}
    if not metrics["skipped"]:
        judged = judge(labels)
        metrics = {kind: result.metrics() for kind, result in judged.items()} | {"protocol": protocol}
    if world.is_main:
        tracking.evaluation(key, stage, metrics, params=params)
        say(stage, f"left out: {metrics['skipped']}" if "skipped" in metrics else table(metrics))
    return labels, judged


def judge_features(
    labels: Labels, world: World, judge: Callable[[str, Mapping[str, LabelledRows]], Judged]
) -> dict[str, Judged]:
    """Judge every kind of stored features: `judge` is given the kind, and the rows of train, val and test.

    Raises:
        ValueError: features are missing, or of other images than the labels.
    """
    refuse_mixed()
    device, judged = evaluation_device(world), {}
    for kind in KINDS:
        rows = labels.join(read_features(kind))
        judged[kind] = judge(kind, {split: part.to(device) for split, part in rows.items()})
    return judged


def evaluation_device(world: World) -> torch.device:
    """The rank's GPU if it has one of CUDA's; Apple's are not worth their rarer operations here."""
    return world.device if world.device.type == "cuda" else torch.device("cpu")


def best(val: Mapping[Any, Score]) -> Any:
    """The setting with the highest score on val; of equals the first."""
    return max(val, key=lambda setting: val[setting])


def table(metrics: Mapping[str, Any]) -> str:
    """Scores of each kind with their intervals, in percent, and what was chosen, as lines."""
    rows = {kind: metrics[kind] for kind in KINDS if kind in metrics}
    shown = {
        kind: {f"{split}_top1": _percent(row, split) for split in SPLITS}
        | {name: f"{value:g}" for name, value in row.items() if isinstance(value, int | float) and "_top1" not in name}
        for kind, row in rows.items()
    }
    return "\n" + pd.DataFrame(shown).T.to_string()


def _percent(row: Mapping[str, float], split: str) -> str:
    top1, low, high = (f"{100 * row[f'{split}_top1{end}']:.2f}" for end in ("", "_low", "_high"))
    return f"{top1} ({low}-{high})"


def say(stage: str, line: str) -> None:
    """One thing to tell."""
    print(f"{stage}: {line}", flush=True)


def warn(stage: str, lines: Iterable[str]) -> None:
    """Warnings, a line each."""
    for line in lines:
        say(stage, f"warning: {line}")
