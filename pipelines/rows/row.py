"""What one MLflow row says, as plain data: names, params, numbers, words. Knows no MLflow and reads no result.

Names: a curve keeps the name that training gives it (`loss`); a number of metrics/STAGE.json is `STAGE/...` with the
trained backbone's own level left out (`knn/test_top1`, `knn/untrained/test_top1`); a setting is `section.name`.
"""

import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dino.config import VITS
from pipelines import paths

EVALUATION_SECTIONS = ("select", "embed", "knn", "probe", "linear")
VERSIONS = ("torch", "torchvision", "numpy", "dvc", "mlflow", "prefect")
TABLES = ("_by_", "class_balance")  # one number a setting or a class: the JSON file, logged whole, keeps them
LONGEST_NAME = 150
# Tags that tell rows, and registered versions, apart.
KEY_TAG, CHILD_OF_TAG, EVALUATION_TAG = "dino.key", "dino.child_of", "dino.evaluation"
TEACHER_TAG = f"dvc.{paths.TEACHER}"
Point = tuple[int, dict[str, float]]


@dataclass(frozen=True)
class Lineage:
    """A data set by DVC's md5: what `dvc get` needs to bring exactly it back."""

    name: str
    path: str
    md5: str
    context: str
    profile: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowContent:
    """All that is known of one pretraining key; what is not known is empty. Completing a row with it twice is once."""

    key: str
    name: str = ""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    summaries: dict[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    points_digest: str = ""  # tells whole curves apart; a row that has them is not asked for every step again
    data: list[Lineage] = field(default_factory=list)
    teacher_md5: str | None = None
    files: list[tuple[Path, str]] = field(default_factory=list)  # (file, its folder among the artifacts)


@dataclass(frozen=True)
class EvaluationContent:
    """Results of evaluating a checkpoint under one set of settings; `digest` tells sets apart."""

    digest: str
    params: dict[str, str]
    summaries: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: list[tuple[Path, str]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)


def plain(settings: Any) -> dict[str, Any]:
    """Settings (a pydantic model, or a mapping already) as plain dictionaries, lists and numbers."""
    if hasattr(settings, "model_dump"):
        return dict(settings.model_dump(mode="json"))
    return dict(settings)


def flat_params(section: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Settings of one section as MLflow params: {"pretrain.epochs": "5", "pretrain.ratio": "[0.75, 1.33]"}."""
    return texts({f"{section}.{name}": value for name, value in values.items()})


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as MLflow keeps params and tags: words as they are, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def evaluation_digest(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits of the settings that evaluation reads (EVALUATION_SECTIONS)."""
    chosen = {section: settings.get(section) for section in EVALUATION_SECTIONS}
    return hashlib.md5(json.dumps(chosen, sort_keys=True).encode(), usedforsecurity=False).hexdigest()[:12]


def evaluation_params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Params of EVALUATION_SECTIONS."""
    found: dict[str, str] = {}
    for section in EVALUATION_SECTIONS:
        found |= flat_params(section, settings.get(section) or {})
    return found


def summarise(stage: str, metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers of metrics/STAGE.json under `STAGE/...`, and its words as tags `STAGE.name`.

    The trained backbone's numbers stand directly below the stage; tables per setting or class are left to the file.
    """
    numbers: dict[str, float] = {}
    words: dict[str, str] = {}

    def walk(place: tuple[str, ...], values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            here = (*place, str(name))
            if isinstance(value, Mapping):
                if not any(table in str(name) for table in TABLES):
                    walk(place if here == ("trained",) else here, value)
            elif isinstance(value, bool | str) and name != "key" and value != "":
                words[".".join((stage, *here))] = str(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                numbers["/".join((stage, *here))] = float(value)

    walk((), metrics)
    return numbers, words


def run_name(pretrain: Mapping[str, Any], differs: Mapping[str, str] | None = None) -> str:
    """What tells a row from its neighbours: the settings that differ from the baseline's.

    Where none does: network, length, seed. The DVC experiment's name is added if it has one.

    Args:
        pretrain: settings of the training.
        differs: as pipelines.rows.baseline finds them.
    """
    if differs:
        told = ", ".join(f"{name.removeprefix('pretrain.')}={value}" for name, value in differs.items())
        words = [told if len(told) <= LONGEST_NAME else f"{told[:LONGEST_NAME]}..."]
    else:
        width = "x".join(str(pretrain[k]) for k in ("embed_dim", "depth") if pretrain.get(k) is not None)
        arch = str(pretrain.get("arch", "model"))
        network = [f"{arch}/{pretrain.get('patch_size', '?')}", *([width] if width else [])]
        words = [
            *(network if arch in (*VITS, "model") else [arch]),  # no other network has these settings
            f"{pretrain.get('epochs', '?')} epochs",
        ]
        if pretrain.get("seed"):
            words.append(f"seed {pretrain['seed']}")
    if name := os.environ.get("DVC_EXP_NAME"):
        words.append(f"({name})")
    return " ".join(words)


def circumstances() -> dict[str, str]:
    """Tags of this moment: host and versions."""
    tags = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "versions.python": platform.python_version(),
        "mlflow.source.name": "pipelines/stages/pretrain.py",
        "mlflow.source.type": "LOCAL",
    }
    for package in VERSIONS:
        try:
            tags[f"versions.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tags


def md5_tags(outs: Mapping[str, str]) -> dict[str, str]:
    """One tag an out: {"dvc.models/teacher.safetensors": md5}."""
    return {f"dvc.{path}": md5 for path, md5 in sorted(outs.items())}


def files_in(folder: str, files: Iterable[Path | str]) -> list[tuple[Path, str]]:
    """Those of `files` that exist, for one folder among the row's artifacts."""
    return [(Path(file), folder) for file in files if Path(file).is_file()]
