"""What the working directory holds about its checkpoint, read back from files alone: the truth behind an MLflow row.

The teacher's metadata name the key and the settings; metrics/*.json, plots/pretrain.csv and dvc.lock say the rest.
Files that do not belong to this teacher (a pull without a checkout, an edit by hand) are left out, with a word.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from pipelines import paths
from pipelines.evaluation import scores
from pipelines.params import Params
from pipelines.reading import DAMAGE, read_metrics, reading
from pipelines.rows import baseline, row

LOCK = Path("dvc.lock")
EVALUATIONS = {
    "select": paths.SELECT_METRICS,
    "knn": paths.KNN_METRICS,
    "probe": paths.PROBE_METRICS,
    "linear": paths.LINEAR_METRICS,
}
PICTURES = (paths.SAMPLES_PICTURE, paths.CROPS_PICTURE)
PAGE_FORMATS = (".html", ".png", ".css", ".js", ".svg")


@dataclass(frozen=True)
class Workspace:
    """The checkpoint's row, its evaluation if there is one, and what was left out and why."""

    content: row.RowContent
    evaluation: row.EvaluationContent | None
    left_out: list[str] = field(default_factory=list)


def file_md5(path: Path) -> str:
    """DVC's md5 of one file: the md5 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class Lock:
    """dvc.lock, read: md5 of every out, and the params that each stage last ran with."""

    def __init__(self, path: Path = LOCK) -> None:
        """Read `path`; a missing file is an empty lock.

        Raises:
            ValueError: the file is no YAML.
        """
        self.stages: dict[str, Any] = {}
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            for name, stage in ((read or {}).get("stages") or {}).items():
                for entry in [*stage.get("deps", []), *stage.get("outs", [])]:
                    Path(entry["path"])
                self.stages[name] = stage
        except (yaml.YAMLError, *DAMAGE) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); after a merge: git checkout {path}, dvc repro"
            ) from error

    def outs(self, *stages: str) -> dict[str, str]:
        """{path: md5} of the outs of these stages (none named: of all)."""
        return {
            out["path"]: out["md5"]
            for name in stages or self.stages
            for out in self.stages.get(name, {}).get("outs", [])
            if "md5" in out
        }

    def deps(self, stage: str) -> dict[str, str]:
        """{path: md5} of what this stage read."""
        return {dep["path"]: dep["md5"] for dep in self.stages.get(stage, {}).get("deps", []) if "md5" in dep}

    def params(self) -> dict[str, Any]:
        """Params as the stages last ran with them, nested by section."""
        nested: dict[str, Any] = {}
        for stage in self.stages.values():
            for dotted, value in (stage.get("params", {}).get(paths.PARAMS.name) or {}).items():
                section, _, name = dotted.partition(".")
                if name:
                    nested.setdefault(section, {})[name] = value
                else:
                    nested[section] = {**nested.get(section, {}), **value}
        return nested


def teacher_metadata(path: Path = paths.TEACHER) -> dict[str, Any]:
    """The `dino` entry of the backbone's file: arch, params, data_md5, key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that this project did not write.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `dvc repro select` makes it, `dvc pull` fetches it")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = dict(json.loads((file.metadata() or {})["dino"]))
        if not (isinstance(facts["key"], str) and isinstance(facts["params"], dict)):
            raise TypeError("key and params")
        return facts
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} has no metadata entry `dino` with key and params: not written by this project's pretraining"
        ) from error
    except Exception as error:  # safetensors' own error has no public base class
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); fetch it anew: dvc checkout {path}"
        ) from error


def read_curve(path: Path = paths.PRETRAIN_CURVES) -> list[row.Point]:
    """Points of plots/pretrain.csv: (step, the other columns as numbers; empty cells left out)."""
    if not path.is_file():
        return []
    with reading(path, "pretrain"), path.open(encoding="utf-8", newline="") as file:
        return [
            (int(line["step"]), {name: float(v) for name, v in line.items() if name != "step" and v not in ("", None)})
            for line in csv.DictReader(file)
        ]


def read_json(path: Path) -> dict[str, Any]:
    """A metrics file, or {} where there is none."""
    return read_metrics(path, "prepare" if path == paths.DATA_METRICS else path.stem) if path.is_file() else {}


def data_lineage(lock: Lock, folder: str, images: Mapping[str, int] | None = None) -> list[row.Lineage]:
    """The prepared tables as data sets by md5; pretraining reads train, evaluation all three."""
    md5s, counts = lock.outs("prepare"), images or {}
    return [
        row.Lineage(
            name=f"{Path(folder).name}/{split}",
            path=str(path),
            md5=md5s[str(path)],
            context="pretraining" if split == "train" else "evaluation",
            profile={"images": counts[split]} if split in counts else {},
        )
        for split, path in paths.IMAGES.items()
        if str(path) in md5s
    ]


def a_snapshot() -> Path:
    """A snapshot of the training: what its stage leaves before the teacher is selected."""
    return min(paths.SNAPSHOTS.glob("epoch_*.safetensors"), default=paths.SNAPSHOTS / "epoch_0001.safetensors")


def gather(settings: Mapping[str, Any], checkpoint: Path = paths.TEACHER) -> Workspace:
    """Everything that the working directory holds about its checkpoint.

    Args:
        settings: params.yaml, for sections that dvc.lock does not hold yet.
        checkpoint: A backbone that names the training; unless it is the teacher, evaluations are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one that this project did not write.
    """
    teacher, lock, left_out = teacher_metadata(checkpoint), Lock(), []
    key, md5, locked = teacher["key"], file_md5(checkpoint), _as_validated({**settings, **lock.params()})
    held = lock.outs().get(str(checkpoint)) == md5
    if not held:
        left_out.append(
            f"{checkpoint} is not the one that {LOCK} holds, so the md5s and evaluations of {LOCK} are left out; "
            "`dvc checkout` or `dvc repro` brings them together"
        )
    summaries: dict[str, float] = {}
    tags: dict[str, str] = {}
    pretrain = read_json(paths.PRETRAIN_METRICS)
    points: list[row.Point] = []
    if pretrain.get("key") == key:
        numbers, words = row.summarise("pretrain", pretrain)
        summaries, tags, points = numbers, words, read_curve()
        tags |= {"health": pretrain["health"]["state"]} if "health" in pretrain else {}  # as the training calls it
    elif pretrain:
        left_out.append(
            f"{paths.PRETRAIN_METRICS} and the curves belong to another checkpoint; `dvc checkout` brings them together"
        )
    folder = str(locked.get("data", {}).get("folder", "data"))
    content = row.RowContent(
        key=key,
        name=row.run_name(teacher["params"], baseline.differences(locked) if held else None),
        params=row.flat_params("pretrain", teacher["params"])
        | (row.flat_params("data", locked.get("data", {})) if held else {}),
        tags=tags
        | ({"dino.data_md5": teacher["data_md5"]} if "data_md5" in teacher else {})
        | (row.md5_tags(lock.outs("fetch", "prepare")) if held else {})
        | (row.md5_tags(lock.outs("pretrain")) if held and _selected_from_these_snapshots(lock) else {}),
        summaries=summaries,
        points=points,
        points_digest=file_md5(paths.PRETRAIN_CURVES) if points else "",
        data=data_lineage(lock, folder, read_json(paths.DATA_METRICS).get("images")) if held else [],
        teacher_md5=md5 if checkpoint == paths.TEACHER else None,
        files=row.files_in("pictures", PICTURES)
        + row.files_in("metrics", [paths.PRETRAIN_METRICS, paths.DATA_METRICS]),
    )
    return Workspace(content, _evaluation(lock, locked, left_out) if held else None, left_out)


def _as_validated(settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers that a stage sees (PyYAML reads dvc.lock's 1e-05 as text); as they are if of an older params.yaml."""
    try:
        return row.plain(Params.model_validate(settings))
    except ValueError:
        return settings


def _evaluation(lock: Lock, locked: Mapping[str, Any], left_out: list[str]) -> row.EvaluationContent | None:
    """Evaluations that dvc.lock ties to its teacher: by teacher -> features -> metrics, md5 by md5."""
    summaries: dict[str, float] = {}
    tags: dict[str, str] = {}
    files: list[tuple[Path, str]] = []
    for stage, path in EVALUATIONS.items():
        if not path.is_file():
            continue
        if why := _not_of_teacher(lock, stage, path):
            left_out.append(f"{path}: {why}; `dvc repro {stage}` brings it up to date")
            continue
        numbers, words = row.summarise(stage, read_json(path))
        summaries, tags, files = summaries | numbers, tags | words, [*files, (path, "metrics")]
    if not files:
        return None
    if not left_out:
        with suppress(ValueError):  # metrics of an earlier version; their numbers stand in the row all the same
            health = read_json(paths.PRETRAIN_METRICS).get("health", {})
            tags["verdict"] = scores.verdict(scores.evaluations(), health).sentence
    return row.EvaluationContent(
        digest=row.evaluation_digest(locked),
        params=row.evaluation_params(locked),
        summaries=summaries,
        tags=tags | row.md5_tags(lock.outs("select", "embed", "knn", "probe", "linear")),
        files=files + list(_report()),
        points=_snapshot_points(lock),
    )


def _selected_from_these_snapshots(lock: Lock) -> bool:
    """Whether the teacher in dvc.lock is of the training there."""
    snapshots = str(paths.SNAPSHOTS)
    return lock.deps("select").get(snapshots) == lock.outs("pretrain").get(snapshots)


def _snapshot_points(lock: Lock) -> list[row.Point]:
    """Curves of the snapshots' scores."""
    path = paths.SELECT_CURVES
    if not path.is_file() or lock.outs("select").get(str(path)) != file_md5(path):
        return []
    return [
        (step, {f"snapshot/{name}": value for name, value in values.items() if name != "epoch"})
        for step, values in read_curve(path)
    ]


def _not_of_teacher(lock: Lock, stage: str, path: Path) -> str:
    """Why the metrics of an evaluation stage are not those of the teacher in dvc.lock, or ""."""
    teacher, features = str(paths.TEACHER), str(paths.FEATURES)
    of, made = lock.deps(stage), lock.outs("select", "embed")
    if teacher in of and of[teacher] != made.get(teacher):  # linear reads the teacher itself
        return "it is of another teacher"
    if stage != "select" and teacher not in of:
        if lock.deps("embed").get(teacher) != made.get(teacher):
            return "its features are of another teacher"
        if of.get(features) != made.get(features):
            return "it was computed on other features"
    if lock.outs(stage).get(str(path)) != file_md5(path):
        return f"its content is not what {LOCK} holds"
    return ""


def _report() -> Iterator[tuple[Path, str]]:
    """The report's page and pictures."""
    for path in sorted(paths.REPORT.glob("*")) if paths.REPORT.is_dir() else ():
        if path.is_file() and path.suffix in PAGE_FORMATS:
            yield path, "report"
