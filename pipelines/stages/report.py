"""Stage report: one self-contained HTML page, and its pictures beside it.

Only results stand in it, no time, host, path or run id: equal results give equal bytes.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from dino.checkpoint import load_backbone
from dino.config import FIELD_NAMES
from dino.files import whole_file
from pipelines import paths
from pipelines.evaluation import scores
from pipelines.evaluation.confusion import Confusion
from pipelines.params import Params
from pipelines.pictures import charts, gallery
from pipelines.pictures.drawing import DARK, LIGHT, data_uri, picture_png, png, svg
from pipelines.pictures.gallery import Classes
from pipelines.pictures.snapshot_chart import snapshot_figures
from pipelines.processes.stage import run_stage
from pipelines.reading import read_metrics, reading
from pipelines.rows import tracking

PAGE = "index.html"
TEMPLATE = Path(__file__).parents[1] / "pictures/report.html.j2"
CLASSES_LISTED_UP_TO = 60
COUNTED = {
    "grey": "grey images",
    "shrunk": "shrunk to data.max_short_px",
    "broken": "unreadable, left out",
    "other_files": "files that are no images",
    "within_train": "duplicates within train",
    "within_val": "duplicates within val",
    "within_test": "duplicates within test",
    "train_in_val": "train images in val too",
    "train_in_test": "train images in test too",
    "val_in_test": "val images in test too",
    "label_conflicts": "images in several classes",
}
SHEETS = {"Training images": paths.SAMPLES_PICTURE, "Crops that training sees": paths.CROPS_PICTURE}


def main(params: Params) -> None:
    """Write report/, and show it in MLflow."""
    _, facts = load_backbone(paths.TEACHER)
    content, figures = collect(params, facts)
    files = {name: png(figure) for name, figure in figures.items()} | {PAGE: render(content).encode()}
    shutil.rmtree(paths.REPORT, ignore_errors=True)  # DVC has done so already; a run by hand has not
    for name, data in files.items():
        with whole_file(paths.REPORT / name) as aside:
            aside.write_bytes(data)
    pictures = [paths.REPORT / name for name in figures]
    tracking.report(facts["key"], pages=[paths.REPORT / PAGE], pictures=pictures, params=params)
    print(f"report: {(paths.REPORT / PAGE).resolve()}", flush=True)


def collect(params: Params, facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Figure]]:
    """What the template shows, by its names there; and the figures, by their file's name."""
    classes, evaluations = Classes.read(), scores.evaluations()
    training = read_metrics(paths.PRETRAIN_METRICS, "pretrain", "health", "epochs", "images_seen")
    with reading(paths.PRETRAIN_METRICS, "pretrain"):
        found = training["health"]
        health = {name: str(found[name]) for name in ("state", "advice", "finding")}
        health["since_epoch"] = f"{finite(found['since_epoch']):.1f}"
        healthy_above = {str(name): finite(limit) for name, limit in found["healthy_above"].items()}
        ln_k = finite(training["prototypes_log"])
        training |= {"health": health, "epochs": int(training["epochs"]), "images_seen": int(training["images_seen"])}
        verdict = scores.verdict(evaluations, health)
    data = read_metrics(paths.DATA_METRICS, "prepare")
    with reading(paths.DATA_METRICS, "prepare"):
        data_rows, images = list(data_facts(data)), sum(data["images"].values())
    selected = read_metrics(paths.SELECT_METRICS, "select", "checkpoint", "words", "bank_images", "val_images")
    with reading(paths.SELECT_METRICS, "select"):
        selected |= {name: int(selected[name]) for name in ("epoch", "bank_images", "val_images")}
        if not selected["bank_images"]:
            selected["without_knn"] = str(selected["without_knn"])
        snapshots = snapshot_rows(selected)
        snapshot_drawings = snapshot_figures(snapshots, selected["epoch"])
    queries = gallery.choose_queries(classes, params.report.nearest_queries)
    neighbours = gallery.neighbour_rows(classes, queries, params.report.nearest_neighbours)
    size = {"resize_px": params.embed.resize_px, "crop_px": params.embed.crop_px}
    headings, looks = gallery.look_rows(classes, queries, **size)
    with reading(paths.PRETRAIN_CURVES, "pretrain"):
        panels = charts.panels(pd.read_csv(paths.PRETRAIN_CURVES), ln_k=ln_k, healthy_above=healthy_above)
        if not panels:
            raise ValueError("no curve in it")
    confusion = Confusion.read(classes.names)

    figures = {"scores.png": charts.scores_figure(evaluations), "curves.png": charts.panels_figure(panels)}
    if confusion:
        figures["confusion.png"] = charts.confusion_figure(confusion.shares, confusion.names)
    figures["neighbours.png"] = charts.pictures_figure(neighbours)
    figures["attention.png"] = charts.pictures_figure(looks, headings)

    counts = classes.counts()
    compared = [item.right for row in neighbours for item in row if item.right is not None]
    content = {
        "verdict": verdict,
        "evaluations": evaluations,
        "kinds": scores.KINDS,
        "in_words": scores.IN_WORDS,
        "scale": charts.Scale.of(evaluations),
        "training": training,
        "panels": [(panel, Markup(svg(charts.panel_figure(panel), f"c{i}"))) for i, panel in enumerate(panels)],
        "selected": selected,
        "snapshots": snapshots,
        "snapshot_panels": [
            (title, Markup(svg(figure, f"s{i}"))) for i, (title, figure) in enumerate(snapshot_drawings.items())
        ],
        "confusion": confusion,
        "confusion_svg": confusion and Markup(svg(charts.confusion_figure(confusion.shares, confusion.names), "m")),
        "neighbours": neighbours,
        "query_rule": gallery.QUERY_RULE if classes.names else gallery.QUERY_RULE_UNLABELLED,
        "compared": len(compared),
        "agreeing": sum(compared),
        "looks": looks,
        "headings": headings,
        "arch_name": facts["params"]["arch"],
        "images": images,
        "data": data_rows,
        "class_counts": counts if len(counts) <= CLASSES_LISTED_UP_TO else {},
        "largest_class": max((in_splits[0] for in_splits in counts.values()), default=0) or 1,
        "splits": list(paths.IMAGES),
        "sheets": [(title, data_uri(path.read_bytes())) for title, path in SHEETS.items() if path.is_file()],
        "recipe": [(name, plain(facts["params"][name])) for name in FIELD_NAMES if name in facts["params"]],
        "provenance": {"key of the pretraining": facts["key"], "md5 of the training images": facts["data_md5"]},
    }
    return content, figures


def snapshot_rows(selected: Mapping[str, Any]) -> list[dict[str, float]]:
    """Scores of every snapshot by epoch, out of metrics/select.json."""
    names = ["epoch", "step", "rank_me", "feature_std"]
    if selected["bank_images"]:
        names += ["val_top1", "val_top1_low", "val_top1_high"]
    rows = [{name: finite(found[name]) for name in names} for found in selected["scores_by_epoch"].values()]
    return sorted(rows, key=lambda row: row["epoch"])


def finite(number: Any) -> float:
    """A number that the page can show.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{number!r} is no number")
    return number


def render(content: Mapping[str, Any]) -> str:
    """The page. Class names and everything else that a data set brings are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": scores.percent,
        "thousands": "{:,}".format,
        "uri": lambda pixels: data_uri(picture_png(pixels)),
    }
    return environment.get_template(TEMPLATE.name).render(**content, light=LIGHT, dark=DARK) + "\n"


def data_facts(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Facts of metrics/data.json in words; duplicates and the like only where there are any."""
    for split in paths.IMAGES:
        yield f"{split} images", plain(data["images"][split])
    yield "classes", plain(data["classes"]) if data["classes"] else "no labels"
    yield "channels", "1 (grey)" if data["channels"] == 1 else plain(data["channels"])
    yield "mean of the pixels (0 to 1)", plain(data["mean"])
    yield "standard deviation", plain(data["std"])
    for side in ("width_px", "height_px"):
        smallest, median, largest = (data[side][name] for name in ("smallest", "median", "largest"))
        several = f"{plain(smallest)} to {plain(largest)}, median {plain(median)}"
        yield side.replace("_px", " (pixels)"), plain(largest) if smallest == largest else several
    counts = {name: data[name] for name in ("shrunk", "broken", "other_files")} | data["duplicates"]
    if data["channels"] == 3:
        counts["grey"] = data["grey"]
    for name, count in counts.items():
        if count:
            yield COUNTED.get(name, name.replace("_", " ")), plain(count)


def plain(value: Any) -> str:
    """A setting or a number as text: no digits that say nothing."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(plain, value))
    return str(value)


if __name__ == "__main__":
    run_stage("report", main)
