"""Scores of the evaluations, and what they say in plain words. Imports nothing heavy: the summary starts at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipelines import paths
from pipelines.reading import read_metrics, reading

KINDS = {"pixels": "Raw pixels", "untrained": "Untrained backbone", "trained": "Trained backbone"}
BASELINES = {"untrained": "the untrained network", "pixels": "raw pixels"}
EVALUATIONS = {
    "k-NN": paths.KNN_METRICS,
    "probe": paths.PROBE_METRICS,
    "linear evaluation": paths.LINEAR_METRICS,
}
IN_WORDS = {  # each fits a line of 80 behind its name
    "k-NN": "votes of the nearest training images; nothing is trained",
    "probe": "a linear classifier on stored features: quick, raw pixels too",
    "linear evaluation": "the paper's, a linear classifier on augmented images",
}
MORE_TRAINING = "Healthy but not ahead: first give it more training (pretrain.epochs), then other crops."


class Top1(NamedTuple):
    """A share of right answers, 0 to 1, and its 95 % interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        """Like `87.1 (86.4-87.8)`, in percent."""
        return f"{percent(self.share)} ({percent(self.low)}-{percent(self.high)})"

    @staticmethod
    def read(values: Mapping[str, float], prefix: str = "") -> "Top1":
        """From PREFIXtop1, PREFIXtop1_low and PREFIXtop1_high.

        Raises:
            KeyError, TypeError, ValueError: one is missing or no share of 1.
        """
        found = Top1(*(values[f"{prefix}top1{end}"] for end in ("", "_low", "_high")))
        if not all(0 <= value <= 1 for value in found):
            raise ValueError("a score is no share of 1")
        return found


@dataclass(frozen=True)
class Score:
    """What one kind of features came to; settings were chosen on val."""

    test: Top1
    val: Top1
    chosen: str = ""
    val_by_setting: Mapping[str, Top1] = field(default_factory=dict)
    diverged: Sequence[str] = ()

    @staticmethod
    def read(values: Mapping[str, Any]) -> "Score":
        """From an entry of an evaluation's metrics file: `k` was chosen on val, out of the table `val_by_k`."""
        table = next((name for name in sorted(values) if name.startswith("val_by_")), "")
        setting = table.removeprefix("val_by_")
        return Score(
            test=Top1.read(values, "test_"),
            val=Top1.read(values, "val_"),
            chosen=", ".join(
                f"{name} = {value:g}"
                for name, value in sorted(values.items())
                if isinstance(value, int | float) and "_top1" not in name
            ),
            val_by_setting={
                f"{setting} = {float(value):g}": Top1.read(values[table][value])
                for value in sorted(values.get(table, ()), key=float)
            },
            diverged=[str(setting) for setting in values.get("diverged", ())],
        )


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found for each kind of features, or why it was left out."""

    name: str
    scores: Mapping[str, Score] = field(default_factory=dict)
    protocol: str = ""
    skipped: str = ""

    @property
    def settings(self) -> list[str]:
        """Every setting tried on the validation images, in its order."""
        return list(dict.fromkeys(setting for score in self.scores.values() for setting in score.val_by_setting))

    @staticmethod
    def read(name: str, path: Path) -> "Evaluation":
        """From an evaluation's metrics file; where there is none, it was left out."""
        if not path.is_file():
            return Evaluation(name, skipped="not evaluated yet")
        values = read_metrics(path, path.stem)
        with reading(path, path.stem):
            scores = {kind: Score.read(values[kind]) for kind in KINDS if kind in values}
            return Evaluation(name, scores, str(values.get("protocol", "")), str(values.get("skipped", "")))


@dataclass(frozen=True)
class Verdict:
    """One sentence, its tone (good, mixed, bad; open: nothing to judge by), and what to do, if anything."""

    sentence: str
    tone: str
    advice: str = ""


def evaluations() -> list[Evaluation]:
    """All evaluations, in order."""
    return [Evaluation.read(name, path) for name, path in EVALUATIONS.items()]


def percent(share: float) -> str:
    """A share of 1 as percent, to the tenth: a test set of 10,000 images resolves about half a point."""
    return f"{100 * share:.1f}"


def standing(trained: Score, baseline: Score) -> str:
    """`beats` or `stays behind` where the two 95 % intervals don't overlap, else `is level with`."""
    if trained.test.low > baseline.test.high:
        return "beats"
    return "stays behind" if trained.test.high < baseline.test.low else "is level with"


def verdict(found: Sequence[Evaluation], health: Mapping[str, Any]) -> Verdict:
    """Whether the trained backbone beats the baselines beyond the 95 % intervals, and whether training is healthy.

    Args:
        found: The evaluations; those without a score of the trained backbone have no say.
        health: `state` and `advice` of metrics/pretrain.json.
    """
    state = health.get("state", "unknown")
    healthy = state == "healthy"
    end = "training is healthy" if healthy else f"training is not healthy ({state})"
    standings = {
        evaluation.name: [
            (standing(evaluation.scores["trained"], evaluation.scores[base]), name)
            for base, name in BASELINES.items()
            if base in evaluation.scores
        ]
        for evaluation in found
        if "trained" in evaluation.scores
    }
    if not standings:
        sentence = f"Without labels the trained backbone has no score; {end}."
        return Verdict(sentence, "open" if healthy else "bad", "" if healthy else health.get("advice", ""))
    words = [word for pairs in standings.values() for word, _ in pairs]
    ahead = all(word == "beats" for word in words)
    tone = "good" if healthy and ahead else "mixed" if healthy and "beats" in words else "bad"
    advice = health.get("advice", "") if not healthy else "" if ahead else MORE_TRAINING
    return Verdict(f"{_comparison(standings)}; {end}.", tone, advice)


def _comparison(standings: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The trained backbone against the baselines; evaluations that agree share a clause."""
    names: dict[str, list[str]] = {}
    for name, pairs in standings.items():
        names.setdefault(_clause(pairs), []).append(name)
    (clause, agreeing), *others = names.items()
    if not others:
        return f"The trained backbone {clause}, {_by(agreeing)}"
    rest = "; ".join(f"{_by(same)} it {text}" for text, same in others)
    first = _by(agreeing)
    return f"{first[0].upper()}{first[1:]} the trained backbone {clause}; {rest}"


def _by(names: Sequence[str]) -> str:
    """`by k-NN, by probe and by linear evaluation`."""
    *others, last = (f"by {name}" for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def _clause(pairs: Sequence[tuple[str, str]]) -> str:
    """`beats the untrained network but stays behind raw pixels`."""
    parts = [(word, [name for _, name in same]) for word, same in groupby(pairs, key=lambda pair: pair[0])]
    text = " but ".join(f"{word} {' and '.join(names)}" for word, names in parts)
    return text or "has no baseline to compare with"
