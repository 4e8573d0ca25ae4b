"""Figures of the report: scores against baselines, training curves, confusion matrix, sheets of pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.evaluation.scores import KINDS, Evaluation, percent
from pipelines.pictures.drawing import LIGHT, style

MARKS = {"pixels": "s", "untrained": "D", "trained": "o"}  # told apart without colour too
NUMBERS_UP_TO = 15  # classes; beyond, the cells of a confusion matrix are too small to be written in
NAMES_UP_TO = 40
PAPER_ABOVE = 0.7  # share from which a cell is so full that, in light and dark, paper reads better on it than ink


@dataclass(frozen=True)
class Panel:
    """Training curves that belong together, against the step."""

    title: str
    lines: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps, values
    marks: dict[str, float] = field(default_factory=dict)  # horizontal lines to read them against
    limits: tuple[float, float] | None = None

    @property
    def last(self) -> str:
        """The last value of each line, to three digits."""
        last = [values[-1] for _, values in self.lines.values()]
        return " · ".join(f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}" for value in last)


TITLES = {
    "loss": "Loss",
    "teacher_entropy": "Entropy of the teacher",
    "information": "Information of the teacher",
    "kl": "Student from teacher (KL)",
    "feature_std": "Spread of features (std)",
    "rank_me": "Directions in use (RankMe)",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
    "weight_decay": "Weight decay",
    "ema_momentum": "Momentum of the teacher",
    "teacher_temp": "Temperature of the teacher",
}
ENTROPIES = {"teacher_entropy": "of an image", "batch_entropy": "of the batch's mean"}
LINE_STYLES = ((LIGHT["trained"], "-"), (LIGHT["untrained"], (0, (5, 2))))


def panels(table: pd.DataFrame, *, ln_k: float, healthy_above: Mapping[str, float]) -> list[Panel]:
    """What plots/pretrain.csv holds: known curves in TITLES' order, then others; entropies as shares of ln K.

    Args:
        table: Columns `step`, `epoch`, and whatever training recorded.
        ln_k: Entropy of K equally likely prototypes, nat. Loss and entropy there mean that nothing is learned.
        healthy_above: The doctor's limits, by column.
    """
    entropies = [column for column in ENTROPIES if column in table]
    found = []
    recorded = list(map(str, table.select_dtypes("number")))
    for column in [*(name for name in TITLES if name in recorded), *(name for name in recorded if name not in TITLES)]:
        title = TITLES.get(column, column.replace("_", " ").capitalize())
        if column == "loss":
            found.append(Panel(title, {"": _line(table, column)}, {f"ln K = {ln_k:.2f}: uniform": ln_k}))
        elif column in entropies[:1]:
            lines = {ENTROPIES[name]: _line(table, name, ln_k) for name in entropies}
            found.append(Panel(title, lines, {"ln K: uniform": 1.0}, (-0.03, 1.12)))
        elif column not in ("step", "epoch", *entropies):
            limit = healthy_above.get(column)
            marks = {} if limit is None else {f"collapsed: below {limit:.2g}": limit}
            found.append(Panel(title, {"": _line(table, column)}, marks))
    return [panel for panel in found if all(len(steps) for steps, _ in panel.lines.values())]


def _line(table: pd.DataFrame, column: str, unit: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    known = table[np.isfinite(table[column])]
    return known["step"].to_numpy(), known[column].to_numpy(dtype=float) / unit


def draw_panel(axes: Axes, panel: Panel) -> None:
    """A panel into axes."""
    for (name, (steps, values)), (colour, dashes) in zip(panel.lines.items(), LINE_STYLES, strict=False):
        axes.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.4, label=name)
    for word, value in panel.marks.items():
        axes.axhline(value, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(word, (1, value), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", va="bottom", color=LIGHT["muted"], fontsize=8)  # fmt: skip
    if len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=LIGHT["muted"], handlelength=2.4, borderpad=0)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    elif panel.marks:
        axes.margins(y=0.12)
    axes.margins(x=0.01)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=6)


def panel_figure(panel: Panel) -> Figure:
    """One panel by itself, without a title."""
    with style():
        figure = Figure(figsize=(3.7, 2.0), layout="constrained")
        draw_panel(figure.subplots(), panel)
        return figure


def panels_figure(shown: Sequence[Panel]) -> Figure:
    """All panels on one sheet."""
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with style():
        figure = Figure(figsize=(3.7 * columns, 2.4 * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(places, shown, strict=False):
            draw_panel(axes, panel)
            axes.set_title(panel.title)
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        figure.supxlabel("step", fontsize=9, color=LIGHT["muted"])
        return figure


def scores_figure(found: Sequence[Evaluation]) -> Figure:
    """Test top-1 of each kind of features with its 95 % interval, a panel an evaluation, on one scale.

    Without scores it is a sheet that says why: `dvc plots` wants the file in any case.
    """
    scored = [evaluation for evaluation in found if evaluation.scores]
    if not scored:
        with style():
            figure = Figure(figsize=(7.4, 1.0))
            words = "\n".join(f"{evaluation.name}: left out ({evaluation.skipped})" for evaluation in found)
            figure.text(0.03, 0.5, words, va="center", linespacing=1.6)
            return figure
    with style():
        figure = Figure(figsize=(7.4, 0.75 + 1.15 * len(scored)), layout="constrained")
        places = figure.subplots(len(scored), 1, squeeze=False, sharex=True).ravel()
        for axes, evaluation in zip(places, scored, strict=True):
            kinds = [kind for kind in KINDS if kind in evaluation.scores]
            for place, kind in enumerate(reversed(kinds)):
                score = evaluation.scores[kind]
                axes.plot(
                    [100 * score.test.low, 100 * score.test.high], [place, place], color=LIGHT[kind], linewidth=2.4
                )
                axes.plot(100 * score.test.share, place, MARKS[kind], color=LIGHT[kind], markersize=7)
                axes.annotate(f"{percent(score.test.share)}", (100 * score.test.high, place), (6, 0), va="center",
                              textcoords="offset points", weight="bold", color=LIGHT[kind])  # fmt: skip
            axes.set_yticks(range(len(kinds)), [KINDS[kind] for kind in reversed(kinds)])
            axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
            axes.set_ylim(-0.6, len(kinds) - 0.4)
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
            axes.spines["left"].set_visible(False)
            axes.set_title(evaluation.name)
        places[-1].margins(x=0.08)
        places[-1].set_xlabel("top-1 on the test images, %; bars: 95 % interval")
        return figure


@dataclass(frozen=True)
class Scale:
    """The common scale of all scores, shares of 1, as places in percent of its length."""

    low: float
    high: float

    @staticmethod
    def of(found: Sequence[Evaluation]) -> "Scale | None":
        """From the intervals, outwards to multiples of 5 %; None without scores."""
        scored = [score for evaluation in found for score in evaluation.scores.values()]
        if not scored:
            return None
        low, high = min(score.test.low for score in scored), max(score.test.high for score in scored)
        return Scale(math.floor(low * 20 - 0.2) / 20, math.ceil(high * 20 + 0.2) / 20)

    @property
    def ticks(self) -> list[float]:
        """Round shares, at most seven."""
        step = next(step for step in (5, 10, 20) if 100 * (self.high - self.low) <= 6 * step)
        first = math.ceil(100 * self.low / step - 1e-9)
        return [tick * step / 100 for tick in range(first, math.floor(100 * self.high / step + 1e-9) + 1)]

    def at(self, share: float) -> str:
        """Place of a share."""
        return f"{100 * (share - self.low) / (self.high - self.low):.2f}"


def confusion_figure(shares: np.ndarray, names: Sequence[str]) -> Figure:
    """Shares of each actual class (rows) given to each class (columns), the darker the more.

    Args:
        shares: [classes, classes], rows sum to 1 (or 0: a class without test images).
        names: Of the classes, in this order.
    """
    count = len(names)
    named, numbered = count <= NAMES_UP_TO, count <= NUMBERS_UP_TO
    side = max(3.6, 0.44 * count) if numbered else max(5.0, min(8.0, 0.2 * count))
    with style():
        figure = Figure(figsize=(side + 1.5, side + 0.9), layout="constrained")
        axes = figure.subplots()
        colour = np.array(mpl.colors.to_rgb(LIGHT["trained"]))
        cells = np.concatenate([np.broadcast_to(colour, (count, count, 3)), shares[..., None] ** 0.8], axis=-1)
        if numbered:
            for row, column in np.argwhere(shares > 0):
                axes.add_patch(
                    mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, color=cells[row, column], linewidth=0)
                )
                if (text := f"{100 * shares[row, column]:.0f}") != "0":
                    full = shares[row, column] > PAPER_ABOVE
                    axes.text(column, row, text, ha="center", va="center", fontsize=8,
                              color=LIGHT["paper"] if full else LIGHT["ink"])  # fmt: skip
        else:
            axes.imshow(cells, interpolation="nearest")
        axes.set(
            xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal", xlabel="predicted", ylabel="actual"
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if named:
            shown = [_short(name) for name in names]
            axes.set_xticks(range(count), shown, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), shown)
            axes.tick_params(labelcolor=LIGHT["ink"])
        return figure


@dataclass(frozen=True)
class Picture:
    """A picture with a caption; right: whether its class is the row's (None: not said)."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    caption: str = ""
    right: bool | None = None


def pictures_figure(rows: Sequence[Sequence[Picture]], headings: Sequence[str] = ()) -> Figure:
    """Pictures in rows as high as their tallest, captions below; the wrong ones are framed and crossed."""
    columns, pitch, between = max(len(row) for row in rows), 1.12, 0.28
    heights = [max(_share_of_square(picture)[0] for picture in row) for row in rows]
    tops = np.cumsum([0.0, *(height + between for height in heights)])
    with style():
        figure = Figure(figsize=(0.95 * columns * pitch, 0.95 * tops[-1] + 0.3))
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set(xlim=(-0.06, columns * pitch), ylim=(tops[-1], -0.22), aspect="equal")
        axes.set_axis_off()
        for index, heading in enumerate(headings):
            axes.text(index * pitch + 0.5, -0.06, heading, ha="center", va="bottom", fontsize=8, weight="bold")
        for top, row_height, row in zip(tops, heights, rows, strict=False):  # the last of the tops is the end
            for index, picture in enumerate(row):
                _draw_picture(axes, picture, index * pitch, top, row_height)
        return figure


def _share_of_square(picture: Picture) -> tuple[float, float]:
    """Height and width of a picture whose longer side is 1."""
    height, width = picture.pixels.shape[:2]
    return height / max(height, width), width / max(height, width)


def _draw_picture(axes: Axes, picture: Picture, left: float, top: float, row_height: float) -> None:
    height, width = _share_of_square(picture)
    x, y = left + (1 - width) / 2, top + (row_height - height) / 2
    axes.imshow(picture.pixels, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="equal")
    wrong = picture.right is False
    if wrong:
        axes.add_patch(
            mpl.patches.Rectangle((x, y), width, height, fill=False, color=LIGHT["untrained"], linewidth=2.2)
        )
    axes.text(left + 0.5, top + row_height + 0.03, _short(picture.caption) + (" ✗" if wrong else ""), ha="center",
              va="top", fontsize=7, color=LIGHT["untrained"] if wrong else LIGHT["muted"])  # fmt: skip


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
