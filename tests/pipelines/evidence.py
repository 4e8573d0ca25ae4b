"""A working directory as a pipeline leaves it: the files of every stage, and their dvc.lock."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from pipelines import paths
from pipelines.params import load
from pipelines.rows import workspace

STEPS = (20, 40, 60, 80)
SETTINGS: dict[str, Any] = load(Path(__file__).parents[2] / paths.PARAMS).model_dump(mode="json")
SETTINGS["data"] |= {"folder": "data/raw/digits"}
SETTINGS["pretrain"] |= {"arch": "vit_tiny", "patch_size": 4, "embed_dim": 64, "num_heads": 2, "depth": 3,
                         "epochs": 5, "seed": 0, "global_px": 20, "local_px": 12}  # fmt: skip
SETTINGS["knn"] |= {"temperature": 0.07}
SETTINGS["probe"] |= {"lrs": [1e-5, 0.1, 1.0]}
SETTINGS["runtime"]["tracking"] |= {"enabled": True, "experiment": "dino", "uri": None}
RESOLVED = {**SETTINGS["pretrain"], "precision": "fp32"}


def scores(top1: float) -> dict[str, Any]:
    def beside(value: float) -> dict[str, float]:
        return {"top1": value, "top1_low": value - 0.02, "top1_high": value + 0.02}

    kinds = {"trained": top1, "untrained": top1 - 0.1, "pixels": top1 + 0.05}
    return {
        kind: {"val_top1": value, "val_top1_low": value - 0.02, "val_top1_high": value + 0.02,
               "test_top1": value, "test_top1_low": value - 0.01, "test_top1_high": value + 0.01,
               "k": 10, "val_by_k": {"5": beside(value - 0.01), "10": beside(value)}}
        for kind, value in kinds.items()
    } | {"protocol": "weighted k-NN on stored features"}  # fmt: skip


SNAPSHOT = {"val_top1": 0.7, "rank_me": 20.5, "feature_std": 0.1}
SNAPSHOTS = {4: 60, 5: 80}  # epoch and step


def selected() -> dict[str, Any]:
    """metrics/select.json."""
    found = {str(epoch): {"epoch": epoch, "step": step, **SNAPSHOT} for epoch, step in SNAPSHOTS.items()}
    return {**found["5"], "scores_by_epoch": found, "checkpoint": "last", "words": "No later checkpoint is worse."}


def snapshot_points() -> list[tuple[int, dict[str, float]]]:
    """What stage select tells MLflow."""
    return [(step, {f"snapshot/{name}": value for name, value in SNAPSHOT.items()}) for step in SNAPSHOTS.values()]


def curve_points() -> list[tuple[int, dict[str, float]]]:
    return [
        (step, {"epoch": float(step // 40), "loss": math.log(1024) - step / 50, "lr": 1e-6 * step}) for step in STEPS
    ]


def lay(
    root: Path, *, key: str = "k1", seed: int = 0, knn: float = 0.8, probe: float = 0.82, linear: float = 0.84
) -> None:
    """Write every file below `root`, as after a `dvc repro`; `seed` chooses the teacher's weights."""
    for folder in ("metrics", "plots", "models", "data/prepared", "features", "report"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / paths.PARAMS).write_text(yaml.safe_dump(SETTINGS))
    teacher = {"format": "dino-backbone-1", "params": RESOLVED, "data_md5": "d" * 32, "key": key, "seed": 0}
    weights = np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32)
    snapshot = root / paths.SNAPSHOTS / "epoch_0005.safetensors"
    for path in (root / paths.TEACHER, snapshot):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"cls_token": weights}, path, metadata={"dino": json.dumps(teacher)})
    for path in (*paths.IMAGES.values(), paths.LABELS, paths.TRAINING_STATE):
        (root / path).write_bytes(str(path).encode())
    (root / "features/trained.parquet").write_bytes(weights.tobytes())
    _json(root / paths.DATA_METRICS, {"images": {"train": 90, "val": 10, "test": 20}, "classes": 3,
                                      "class_balance": {"T-shirt & top": 30}, "mean": [0.1]})  # fmt: skip
    _json(root / paths.PRETRAIN_METRICS, {"loss": 5.5, "epochs": 5, "images_seen": 450, "key": key,
                                          "health": {"state": "healthy", "advice": ""}})  # fmt: skip
    _json(root / paths.SELECT_METRICS, selected())
    with (root / paths.SELECT_CURVES).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "epoch", *SNAPSHOT])
        writer.writerows([step, epoch, *SNAPSHOT.values()] for epoch, step in SNAPSHOTS.items())
    _json(root / paths.KNN_METRICS, scores(knn))
    _json(root / paths.PROBE_METRICS, scores(probe))
    _json(root / paths.LINEAR_METRICS, scores(linear))
    with (root / paths.PRETRAIN_CURVES).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "epoch", "loss", "lr"])
        writer.writerows([step, *values.values()] for step, values in curve_points())
    (root / paths.CROPS_PICTURE).write_bytes(PNG)
    (root / paths.REPORT / "index.html").write_text("<h1>report</h1>")
    write_lock(root)


def write_lock(root: Path, settings: dict[str, Any] = SETTINGS) -> None:
    """The dvc.lock of what lies below `root`."""

    def entry(path: Path) -> dict[str, Any]:
        whole = root / path
        md5 = "f" * 32 + ".dir" if whole.is_dir() else workspace.file_md5(whole)
        if whole.is_dir():
            md5 = workspace.file_md5(next(p for p in sorted(whole.iterdir()))) + ".dir"
        return {"path": str(path), "hash": "md5", "md5": md5}

    def stage(deps: list[Path], outs: list[Path], *sections: str) -> dict[str, Any]:
        params = {"params": {"params.yaml": {s: settings[s] for s in sections}}} if sections else {}
        return {"cmd": "x", "deps": [entry(p) for p in deps], "outs": [entry(p) for p in outs], **params}

    images = list(paths.IMAGES.values())
    lock = {
        "schema": "2.0",
        "stages": {
            "prepare": stage([], [*images, paths.LABELS, paths.DATA_METRICS], "data"),
            "pretrain": stage(images[:1], [paths.SNAPSHOTS, paths.TRAINING_STATE, paths.PRETRAIN_METRICS], "pretrain"),
            "select": stage([paths.SNAPSHOTS], [paths.TEACHER, paths.SELECT_METRICS, paths.SELECT_CURVES], "select"),
            "embed": stage([paths.TEACHER], [paths.FEATURES], "embed"),
            "knn": stage([paths.FEATURES, paths.LABELS], [paths.KNN_METRICS], "knn"),
            "probe": stage([paths.FEATURES, paths.LABELS], [paths.PROBE_METRICS], "probe"),
            "linear": stage([paths.TEACHER, *images, paths.LABELS], [paths.LINEAR_METRICS], "linear"),
        },
    }
    # as ruamel writes it for DVC: 1e-05, which PyYAML reads back as text
    (root / workspace.LOCK).write_text(yaml.safe_dump(lock).replace("1.0e-05", "1e-05").replace("1.0e-06", "1e-06"))


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200"
    "81a5b5f3f50000000049454e44ae426082"
)
