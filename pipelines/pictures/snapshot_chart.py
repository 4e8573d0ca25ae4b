"""How the snapshots of a training do on the validation images, against the step; the teacher's one is marked."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from pipelines.evaluation.snapshot_words import Scores
from pipelines.pictures.drawing import LIGHT, style

TITLES = {"val_top1": "k-NN of the teacher while training", "rank_me": "Directions in use (RankMe), on val"}


def snapshot_figures(scores: Sequence[Scores], chosen: int) -> Mapping[str, Figure]:
    """A figure of each score that there is, by its title; k-NN with its 95 % interval as a band."""
    return {title: _figure(scores, name, chosen) for name, title in TITLES.items() if name in scores[0]}


def _figure(scores: Sequence[Scores], name: str, chosen: int) -> Figure:
    unit = 100 if name == "val_top1" else 1
    steps = [found["step"] for found in scores]
    with style():
        figure = Figure(figsize=(3.7, 2.0), layout="constrained")
        axes = figure.subplots()
        if name == "val_top1":
            low, high = ([unit * found[f"{name}_{end}"] for found in scores] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=LIGHT["trained"], alpha=0.15, linewidth=0)
        axes.plot(steps, [unit * found[name] for found in scores], color=LIGHT["trained"], linewidth=1.4, marker=".")
        mark = next(found for found in scores if found["epoch"] == chosen)
        axes.plot(mark["step"], unit * mark[name], "o", color=LIGHT["trained"], markersize=9, markerfacecolor="none")
        axes.axvline(mark["step"], color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (2, 2)))
        side, away = ("right", -4) if mark["step"] > sum(steps) / len(steps) else ("left", 4)
        axes.annotate(f"teacher: epoch {chosen}", (mark["step"], 0.04), (away, 0), ha=side, fontsize=8,
                      xycoords=("data", "axes fraction"), textcoords="offset points", color=LIGHT["muted"])  # fmt: skip
        axes.margins(x=0.03, y=0.15)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6)
        return figure
