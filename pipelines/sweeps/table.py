"""One table of a sweep: a row an experiment, over seeds mean and spread; the best is marked by val, never by test."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dino.files import whole_file
from pipelines.evaluation import scores
from pipelines.evaluation.scores import Score, percent
from pipelines.rows import origin
from pipelines.sweeps.record import Record
from pipelines.sweeps.variants import SEED, Variant, short_names, shown
from pipelines.table import PLAIN

TITLES = {"knn": "k-NN", "probe": "probe", "linear": "linear"}
STAGES = tuple(TITLES)
SPLITS = ("val", "test")
WIDE = 150  # columns; below, only the evaluation that decides is shown


@dataclass(frozen=True)
class SweepTable:
    """The table.

    Attributes:
        name: The sweep's.
        score: knn, probe or linear: whose val top-1 decides.
        keys: The settings that vary, dotted.
        runs: A row an experiment; `STAGE/SPLIT_top1`, `_low`, `_high` are shares of 1, missing where there is none.
        seeds: A row for each set of settings, over its seeds: `STAGE/SPLIT_top1_mean`, `_std`, and `n`; else empty.
    """

    name: str
    score: str
    keys: list[str]
    runs: pd.DataFrame
    seeds: pd.DataFrame

    @property
    def states(self) -> set[str]:
        """Of its experiments."""
        return set(self.runs["state"])


def read(record: Record, names: Sequence[str] | None, score: str) -> SweepTable:
    """The table of these experiments (None: all of the sweep), from what their commits hold."""
    chosen = [Variant(name, record.variants[name]["settings"]) for name in names or record.variants]
    keys = list(dict.fromkeys(key for variant in chosen for key in variant.settings))
    rows = []
    for variant in chosen:
        facts = record.variants[variant.name]
        found: dict[str, Any] = {"experiment": variant.name, "best": False}
        found |= {key: _cell(variant.settings[key]) for key in keys if key in variant.settings}
        found |= {"state": record.state(variant.name), "reason": facts.get("reason", "")}
        found |= {"minutes": round(facts["seconds"] / 60, 2) if "seconds" in facts else None}
        found |= results(commit) if (commit := record.commit(variant.name)) else {}
        rows.append(found | {"commit": commit})
    runs = pd.DataFrame(rows)
    seeds = over_seeds(runs, [key for key in keys if key != SEED]) if SEED in keys else pd.DataFrame()
    return SweepTable(record.name, score, keys, *mark(runs, seeds, score))


def _cell(value: Any) -> Any:
    """A list as text: a table's cell, and a key to group by."""
    return shown(value) if isinstance(value, list) or value is None else value


def results(commit: str) -> dict[str, Any]:
    """What the metrics of an experiment say of the trained backbone."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        values = _metrics(commit, stage)
        if "trained" not in values:
            continue
        score = Score.read(values["trained"])
        for split, top1 in (("val", score.val), ("test", score.test)):
            name = f"{stage}/{split}_top1"
            found |= {name: top1.share, f"{name}_low": top1.low, f"{name}_high": top1.high}
    training = _metrics(commit, "pretrain")
    return found | {"health": training.get("health", {}).get("state", ""), "loss": training.get("loss")}


def _metrics(commit: str, stage: str) -> dict[str, Any]:
    text = origin.git("show", f"{commit}:metrics/{stage}.json")
    return dict(json.loads(text)) if text else {}


def over_seeds(runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) of each score over the seeds of each set of settings."""
    wanted = [f"{stage}/{split}_top1" for stage in STAGES for split in SPLITS]
    columns = [name for name in wanted if name in runs]
    done = runs[runs["state"] == "done"]
    if done.empty or not columns:
        return pd.DataFrame()
    groups = done.groupby([*keys], sort=False, dropna=False) if keys else done.groupby(lambda _: 0)
    found = groups[columns].agg(["mean", "std"])
    found.columns = pd.Index([f"{name}_{what}" for name in columns for what in ("mean", "std")])
    found.insert(0, "n", groups.size())
    return found.reset_index(drop=not keys)


def mark(runs: pd.DataFrame, seeds: pd.DataFrame, score: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same with `best` set at the highest val score: of the means over seeds, if there are seeds."""
    val = f"{score}/val_top1"
    if not seeds.empty and f"{val}_mean" in seeds:
        seeds = seeds.assign(best=seeds.index == seeds[f"{val}_mean"].idxmax())
    elif val in runs and runs[val].notna().any():
        runs = runs.assign(best=runs.index == runs[val].idxmax())
    return runs, seeds


def show(table: SweepTable, console: Console) -> None:
    """Print it."""
    called = short_names(table.keys)
    stages = [stage for stage in STAGES if f"{stage}/val_top1" in table.runs]
    if console.width < WIDE:
        stages = [stage for stage in stages if stage == table.score]
    columns = [(f"{stage}/{split}_top1", f"{TITLES[stage]} {split}") for stage in stages for split in SPLITS]
    if not table.seeds.empty:
        keys = {key: title for key, title in called.items() if key != SEED}
        means = _grid([*keys.values(), "n"], [f"{title}, mean ± std" for _, title in columns])
        for _, row in table.seeds.iterrows():
            cells = [f"{_percent(row[f'{name}_mean'])} ± {_percent(row[f'{name}_std'])}" for name, _ in columns]
            _add(means, row, [*(_text(row[key]) for key in keys), str(row["n"])], cells)
        console.print(means)
        console.print()
    runs = _grid([*called.values()], [*(title for _, title in columns), "health", "minutes"])
    for _, row in table.runs.iterrows():
        settings = [_text(row[key]) for key in table.keys]
        if row["state"] != "done":
            _add(runs, row, settings, [Text(str(row["state"]), style="red" if row["state"] == "failed" else "yellow")])
            continue
        cells = [_interval(row, name) for name, _ in columns]
        _add(runs, row, settings, [*cells, _text(row.get("health")), _text(row["minutes"])])
    console.print(runs)
    for line in remarks(table):
        console.print(Text(line), soft_wrap=True)


def _grid(left: Sequence[str], right: Sequence[str]) -> Table:
    found = Table(**PLAIN | {"padding": (0, 2, 0, 0)})
    found.add_column("", no_wrap=True)
    for title in left:
        found.add_column(title, justify="right", no_wrap=True)
    for title in right:
        found.add_column(title, justify="left" if title == "health" else "right", no_wrap=title == "minutes")
    return found


def _add(grid: Table, row: "pd.Series[Any]", settings: Sequence[str], cells: Sequence[str | Text]) -> None:
    grid.add_row("*" if row["best"] else "", *settings, *cells, style="bold" if row["best"] else "")


def _text(value: Any) -> str:
    return "" if value is None or value != value else shown(value)


def _percent(share: Any) -> str:
    return "-" if share != share else percent(share)


def _interval(row: "pd.Series[Any]", name: str) -> str:
    if row[name] != row[name]:
        return "-"
    return str(scores.Top1(*(row[f"{name}{end}"] for end in ("", "_low", "_high"))))


def remarks(table: SweepTable) -> list[str]:
    """What the numbers are, how sure the best is, why some are missing, and where to go on."""
    lines = []
    title, val = TITLES[table.score], f"{table.score}/val_top1"
    best = table.runs[table.runs["best"]]
    if not table.seeds.empty and "best" in table.seeds:
        lines += ["top-1, percent; single runs with their 95 % interval", f"* best mean {title} on val"]
    elif len(best):
        row = best.iloc[0]
        others = table.runs[(table.runs[val] >= row[f"{val}_low"]) & ~table.runs["best"]]
        lines += ["top-1, percent (95 % interval)", f"* best {title} on val"]
        if len(others):
            same = (others[val] == row[val]).sum()
            equal = f" ({same} with the same score)" if same else ""
            lines[-1] += f"; its interval holds {len(others)} more{equal}: val can't tell them from it, --seeds might"
        lines.append(f"`dvc exp apply {row['experiment']}` brings it here")
    elif (table.runs["state"] == "done").any():
        lines.append(f"No {title} on val, so none is marked (no labels, or another --score)")
    for _, row in table.runs[table.runs["state"] == "failed"].iterrows():
        lines.append(f"{row['experiment']}: {row['reason']}")
    return lines


def write(table: SweepTable, path: Path) -> None:
    """All columns as CSV, shares of 1: rows of experiments, then rows of means over seeds."""
    whole = pd.concat([table.runs, table.seeds], ignore_index=True) if len(table.seeds) else table.runs
    with whole_file(path) as aside:
        whole.to_csv(aside, index=False)
