"""What `make run` ends with: scores against baselines, seconds per stage, where the report and the UI are.

Reads files only, and imports nothing heavy: it is there at once.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines import paths
from pipelines.evaluation import scores
from pipelines.evaluation.scores import KINDS, Evaluation
from pipelines.processes.seconds import read_seconds
from pipelines.reading import read_metrics, reading

NARROW = 80  # columns; below, a score takes a line of its own
PAGE = paths.REPORT / "index.html"
PLAIN: Any = {"box": None, "padding": (0, 3, 0, 0), "header_style": "dim", "footer_style": "dim"}
TONES = {"good": "green", "mixed": "yellow", "bad": "red", "open": "yellow"}


def main() -> None:
    """Print it."""
    console = Console(highlight=False)
    found = scores.evaluations()
    print_scores(console, found)
    if paths.PRETRAIN_METRICS.is_file():
        training = read_metrics(paths.PRETRAIN_METRICS, "pretrain", "health")
        health = training["health"]
        if began_with := training.get("initial_weights"):
            console.print(Text(f"untrained: the weights of {began_with}, before this training", style="dim"))
        with reading(paths.PRETRAIN_METRICS, "pretrain"):
            verdict = scores.verdict(found, health)
        console.print(Text(verdict.sentence, style=TONES[verdict.tone]))
        if verdict.advice:
            console.print(Text(verdict.advice))
    if paths.SELECT_METRICS.is_file():
        selected = read_metrics(paths.SELECT_METRICS, "select", "epoch", "checkpoint", "words")
        console.print(Text(f"Teacher: epoch {selected['epoch']} ({selected['checkpoint']}). {selected['words']}"))
    console.print()
    console.print(seconds_table(stages(), read_seconds()))
    where = str(PAGE.resolve()) if PAGE.is_file() else "not written yet; `dvc repro` writes it"
    console.print(Text(f"\nReport  {where}\nUI      make ui"), soft_wrap=True)


def print_scores(console: Console, found: Sequence[Evaluation]) -> None:
    """Top-1 on the test split of every kind of features, by each evaluation that was made."""
    scored = [evaluation for evaluation in found if evaluation.scores]
    if scored and console.width >= NARROW:
        console.print(scores_table(scored))
    elif scored:
        for kind, title in KINDS.items():
            console.print(Text(title, style="bold"))
            for evaluation in scored:
                if kind in evaluation.scores:
                    console.print(Text(f"  {evaluation.name} {evaluation.scores[kind].test}"), soft_wrap=True)
    if scored:
        console.print(Text("test top-1, percent (95 % interval)", style="dim"))
        for evaluation in scored:
            console.print(Text(f"{evaluation.name}: {scores.IN_WORDS[evaluation.name]}", style="dim"))
    for evaluation in found:
        if not evaluation.scores:
            console.print(Text(f"{evaluation.name}: left out ({evaluation.skipped or 'no scores'})"))


def scores_table(scored: Sequence[Evaluation]) -> Table:
    """A row a kind of features, a column an evaluation."""
    table = Table(**PLAIN)
    table.add_column("")
    for evaluation in scored:
        table.add_column(evaluation.name, justify="right", no_wrap=True)
    for kind, title in KINDS.items():
        cells = [str(e.scores[kind].test) if kind in e.scores else "-" for e in scored]
        table.add_row(title, *cells, style="bold" if kind == "trained" else "")
    return table


def seconds_table(names: Sequence[str], seconds: Mapping[str, float]) -> Table:
    """A row a stage, and their sum."""
    table = Table(**PLAIN, show_footer=True)
    table.add_column("stage", footer="sum")
    known = [seconds[name] for name in names if name in seconds]
    table.add_column("seconds", justify="right", footer=f"{sum(known):,.1f}" if known else "-")
    for name in names:
        table.add_row(name, f"{seconds[name]:,.1f}" if name in seconds else "-")
    return table


def stages() -> list[str]:
    """Stages in dvc.yaml's order, by their commands: all of them run `python -m pipelines.stages.NAME`."""
    return re.findall(r"^ *cmd: python -m pipelines\.stages\.(\w+)$", paths.PIPELINE.read_text(), re.MULTILINE)


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        sys.exit(f"table: {problem}")
