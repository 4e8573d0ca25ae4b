"""How the rows look in MLflow's UI: the columns and charts it opens with, and a row's description. Knows no MLflow.

MLflow's UI keeps a person's columns in the browser. A view that is shared ("Share" in the UI) is a tag of the
experiment: we write that tag ourselves, and `make ui` opens the address that names it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from dino.config import VITS
from pipelines.rows.row import CHILD_OF_TAG, KEY_TAG, TEACHER_TAG

VIEW = "dino"
# Column and its width in pixels, in order; what `selectedColumns` does not know is always shown.
COLUMNS = {
    "attributes.`Run Name`": 250,
    "metrics.`knn/val_top1`": 100,
    "metrics.`knn/test_top1`": 105,
    "metrics.`probe/val_top1`": 110,
    "metrics.`probe/test_top1`": 115,
    "metrics.`linear/val_top1`": 110,
    "metrics.`linear/test_top1`": 115,
    "metrics.`images_per_second`": 145,
    "tags.`health`": 160,
    "duration": 80,
    "runDateAndNestInfo": 140,
    "attributes.`Models`": 130,
    "tags.`dino.data_md5`": 110,
    "tags.`dvc.exp_name`": 130,
}
# Charts of the compared runs, one step axis; a metric without one gets its own chart below these.
SCORES = ("knn/val_top1", "probe/val_top1", "linear/val_top1", "knn/test_top1")
CURVES = (
    "loss",
    "snapshot/val_top1",
    "teacher_entropy",
    "information",
    "kl",
    "rank_me",
    "grad_norm",
    "images_per_second",
)


def _settings_that_differ() -> dict[str, Any]:
    return {
        "uuid": "settings",
        "type": "DIFFERENCE",
        "chartName": "Settings that differ",
        "metricSectionId": "Settings",
        "compareGroups": ["Parameters"],
        "showDifferencesOnly": True,
        "showChangeFromBaseline": False,
        "baselineColumnUuid": "",
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": True,
    }


def _chart(kind: str, section: str, metric: str) -> dict[str, Any]:
    common = {"uuid": metric, "type": kind, "metricSectionId": section, "metricKey": metric, "deleted": False}
    common |= {"runsCountToCompare": 10, "isGenerated": True}
    if kind == "BAR":
        return common
    return common | {
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "selectedXAxisMetricKey": "",
        "selectedMetricKeys": [metric],
        "yAxisExpressions": [],
        "range": {},
        "lineSmoothness": 0,
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


_STATE: dict[str, Any] = {
    "selectedColumns": [name for name in COLUMNS if "." in name],
    "columnOrder": ["0", *COLUMNS],  # 0: the tick box
    "columnWidths": {"0": 73, **COLUMNS},
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "hideEmptyCharts": True,
    "compareRunSections": [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        | {"columns": columns, "cardHeight": height_px}
        for name, columns, height_px in (("Settings", 1, 270), ("Training", 4, 280), ("Scores", 4, 240))
    ],
    "compareRunCharts": [_settings_that_differ()]
    + [_chart("LINE", "Training", metric) for metric in CURVES]
    + [_chart("BAR", "Scores", metric) for metric in SCORES],
    "isAccordionReordered": True,
}
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the UI asks, and shows pages for chat traces
    "mlflow.experiment.primaryMetric.name": "knn/val_top1",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(_STATE),
    "mlflow.note.content": (
        "One row is one pretraining; rows below it are other evaluation settings of the same checkpoint. "
        "Choose by `val`, read `test` once. MLflow is a view: results live in `metrics/*.json` and `dvc.lock`, "
        "and `python -m pipelines.sync` writes their row here."
    ),
}
REGISTERED_TAG = "dino.registered"  # of a row whose checkpoint is in the registry: MODEL/VERSION
GAP = "&emsp;"  # the UI's tables have no space between cells
_KINDS = ("trained", "untrained", "pixels")
_EVALUATIONS = {"knn": ("k-NN", "k"), "probe": ("probe", "lr"), "linear": ("linear evaluation", "lr_at_256")}


def address(server: str, experiment_id: str) -> str:
    """Where the experiment's runs are shown with our columns."""
    runs = f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs"
    return f"{runs}?viewStateShareKey={VIEW}&workflowType=machine_learning"


def describe(
    params: Mapping[str, str],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """Markdown: the result first, then what was trained on what, how to get it back, and pictures (title, address)."""
    lines = [tags.get("verdict", ""), *_scores(metrics), *_training(params, metrics, tags)]
    if registered := tags.get(REGISTERED_TAG):
        model, _, version = registered.rpartition("/")
        lines.append(f"Registered as [{model}, version {version}](#/models/{quote(model)}/versions/{version}).")
    if key := tags.get(KEY_TAG) or tags.get(CHILD_OF_TAG):
        lines.append(f"Pretraining key `{key}`.")
    if md5 := tags.get(TEACHER_TAG):
        lines.append(f"Teacher's DVC md5 `{md5}`.")
    lines += [f"![{title}]({address})" for title, address in pictures]
    return "\n\n".join(filter(None, lines))


def _scores(metrics: Mapping[str, float]) -> list[str]:
    rows = []
    for stage, (title, setting) in _EVALUATIONS.items():
        cells = [_score(metrics, f"{stage}/" if kind == "trained" else f"{stage}/{kind}/") for kind in _KINDS]
        if any(cells):
            chosen = metrics.get(f"{stage}/{setting}")
            how = f" ({setting} {chosen:g})" if chosen is not None else ""
            rows.append(f"| {title}{how}{GAP} | {' | '.join(cell + GAP for cell in cells)} |")
    if not rows:
        return []
    head = f"| top-1 on test (95 % interval) | {' | '.join(kind + GAP for kind in _KINDS)} |\n|---|---|---|---|\n"
    return [head + "\n".join(rows)]


def _score(metrics: Mapping[str, float], prefix: str) -> str:
    top1 = metrics.get(f"{prefix}test_top1")
    if top1 is None:
        return ""
    low, high = metrics.get(f"{prefix}test_top1_low"), metrics.get(f"{prefix}test_top1_high")
    interval = f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else ""
    return f"{top1:.4f}{interval}"


def _training(params: Mapping[str, str], metrics: Mapping[str, float], tags: Mapping[str, str]) -> list[str]:
    lines = []
    if state := tags.get("health"):
        told = [tags.get("pretrain.health.finding", ""), tags.get("pretrain.health.advice", "")]
        lines.append(" ".join(filter(None, [f"Health: **{state}**.", *told])))
    words = []
    if "pretrain.arch" in params:
        arch = params["pretrain.arch"]
        words.append(f"{arch}, patch {params.get('pretrain.patch_size')}" if arch in VITS else arch)
    if "pretrain.epochs" in params:
        words.append(f"{params['pretrain.epochs']} epochs of {params.get('data.folder', 'the data')}")
    if (seen := metrics.get("pretrain/images_seen")) is not None:
        words.append(f"{seen:,.0f} images seen")
    if (loss := metrics.get("pretrain/loss")) is not None:
        words.append(f"loss {loss:.4f}")
    if words:
        lines.append(f"{', '.join(words)}.")
    if words_of_snapshots := tags.get("select.words"):
        lines.append(f"Teacher: epoch {metrics.get('select/epoch', 0):g}. {words_of_snapshots}")
    if skipped := sorted(f"{k.split('.')[0]} left out: {v}" for k, v in tags.items() if k.endswith(".skipped")):
        lines.append(f"{'; '.join(skipped)}.")
    return lines
