"""A folder with results as the stages before `report` leave them, small, made without them."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dino.checkpoint import BACKBONE_FORMAT, save_tensors
from dino.config import PretrainConfig
from dino.images import write_image_table
from dino.vision_transformer import VisionTransformer
from pipelines.evaluation.feature_file import feature_writer
from pipelines.stages.select import COLUMNS as SELECT_COLUMNS

REPOSITORY = Path(__file__).parents[2]
SIDE_PX, WIDTH, PROTOTYPES = 12, 16, 64
QUERIES = 4  # images whose neighbours are shown: half of the usual pictures to draw
COUNTS = {"train": 12, "val": 3, "test": 5}  # images of each class
KEY = "0123456789abcdef"
HEALTHY = {
    "state": "healthy", "advice": "Nothing to do.", "finding": "The teacher tells images apart.", "since_epoch": 0.5,
    "healthy_above": {"information": 0.02, "rank_me": 1.5},
}  # fmt: skip


def interval(share: float, half_width: float, prefix: str = "") -> dict[str, float]:
    """A share and its interval, as a metrics file holds them."""
    ends = {"": share, "_low": share - half_width, "_high": share + half_width}
    return {f"{prefix}top1{end}": value for end, value in ends.items()}


def score(test: float, half_width: float = 0.011, **chosen: float) -> dict[str, Any]:
    """An entry of an evaluation's metrics file."""
    (setting, value), *_ = chosen.items()
    tried = {str(value): interval(test + 0.0123, 0.02), str(value * 2): interval(test - 0.0071, 0.02)}
    scores = interval(test + 0.0123, 0.02, "val_") | interval(test, half_width, "test_")
    return {**scores, setting: value, f"val_by_{setting}": tried}


KNN = {
    "trained": score(0.8714, k=10), "untrained": score(0.6342, k=5), "pixels": score(0.8447, k=20),
    "protocol": "weighted k-NN, temperature 0.07",
}  # fmt: skip
PROBE = {
    "trained": {**score(0.8823, lr=0.3), "damping": 0.25, "diverged": ["lr 30 damping 1"]},
    "untrained": score(0.7011, lr=1.0), "pixels": score(0.8406, lr=0.03),
    "protocol": "probe on stored features",
}  # fmt: skip
LINEAR = {
    "trained": score(0.8931, lr_at_256=0.1), "untrained": score(0.6822, lr_at_256=0.3),
    "protocol": "the paper's linear evaluation",
}  # fmt: skip
NO_LABELS = {"skipped": "the data set has no labels"}


def png(rng: np.random.Generator, label: int, height: int = SIDE_PX) -> bytes:
    """A grey image that shows its class: a bar at a place of its own."""
    pixels = rng.integers(0, 60, (height, SIDE_PX), dtype=np.uint8)
    pixels[:, 3 * label : 3 * label + 3] += 180
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


def make_results(
    root: Path, *, names: Sequence[str] = ("bag", "coat", "shoe"), labelled: bool = True,
    health: dict[str, Any] = HEALTHY, knn: dict[str, Any] = KNN, probe: dict[str, Any] = PROBE,
    linear: dict[str, Any] = LINEAR,
) -> Path:  # fmt: skip
    """Write everything below `root` that `report` reads, and params.yaml; returns root."""
    rng = np.random.default_rng(0)
    label_rows, feature_rows = [], []
    for split, count in COUNTS.items():
        images = []
        for label in range(len(names)):
            for number in range(count):
                data = png(rng, label, SIDE_PX if number else SIDE_PX + 6)
                images.append((hashlib.md5(data).hexdigest()[:16], data, label))
        images.sort()
        rows = [(image_id, data) for image_id, data, _ in images]
        write_image_table(root / f"data/prepared/{split}.arrow", rows, channels=1, mean=[0.28], std=[0.35])
        for image_id, _, label in images:
            known = (label, names[label]) if labelled else (None, None)
            label_rows.append((image_id, split, *known, f"{split}-images[{len(label_rows)}]"))
            feature_rows.append((split, image_id, np.eye(WIDTH)[label] + rng.normal(0, 0.45, WIDTH)))
    _write_tables(root, label_rows, feature_rows)
    found = {"knn": knn, "probe": probe, "linear": linear}
    _write_metrics(root, names if labelled else [], health, found if labelled else dict.fromkeys(found, NO_LABELS))
    _write_model(root)
    if labelled:
        actual = [row[3] for row in label_rows if row[1] == "test"]
        guesses = [names[rng.integers(len(names))] if rng.random() < 0.3 else name for name in actual]
        with (root / "plots/knn_predictions.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("actual", "predicted"), *zip(actual, guesses, strict=True)])
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").replace("enabled: true", "enabled: false")
    text = text.replace("nearest_queries: 8", f"nearest_queries: {QUERIES}")
    (root / "params.yaml").write_text(text, encoding="utf-8")
    return root


def _write_tables(root: Path, label_rows: list[tuple], feature_rows: list[tuple]) -> None:
    names = ["id", "split", "label", "name", "source"]
    types = [pa.string(), pa.string(), pa.int64(), pa.string(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*label_rows, strict=True), types, strict=True)]
    pq.write_table(pa.table(columns, names=names), root / "data/prepared/labels.parquet")
    with feature_writer(root / "features/trained.parquet", kind="trained", key=KEY) as write:
        for split in COUNTS:
            ids, features = zip(*((i, row) for its_split, i, row in feature_rows if its_split == split), strict=True)
            write(split, ids, np.stack(features).astype(np.float32))


def _write_metrics(root: Path, names: Sequence[str], health: dict[str, Any], found: dict[str, Any]) -> None:
    for folder in ("metrics", "plots"):
        (root / folder).mkdir()
    total = len(names) or 3
    data = {
        "images": {split: count * total for split, count in COUNTS.items()},
        "classes": len(names) or None,
        "class_balance": {split: dict.fromkeys(names, count) for split, count in COUNTS.items()} if names else None,
        "channels": 1, "mean": [0.28604], "std": [0.35302], "broken": 0, "other_files": 0, "grey": 60, "shrunk": 0,
        "height_px": {"smallest": SIDE_PX, "median": float(SIDE_PX), "largest": SIDE_PX + 6},
        "width_px": dict.fromkeys(("smallest", "median", "largest"), SIDE_PX),
        "duplicates": {"within_train": 3, "train_in_test": 0},
    }  # fmt: skip
    training = {
        "loss": 3.21, "prototypes_log": math.log(PROTOTYPES), "teacher_entropy": 1.2, "kl": 2.0,
        "health": health, "epochs": 2, "steps": 40, "images_seen": 12345,
        "key": KEY, "precision": "fp32", "parameters": 54321,
    }  # fmt: skip
    snapshots = {
        str(epoch): {"step": 20 * epoch, "epoch": epoch, "rank_me": 3.0 + epoch, "feature_std": 0.1 * epoch}
        | (
            {"val_top1": 0.5 + 0.1 * epoch, "val_top1_low": 0.4 + 0.1 * epoch, "val_top1_high": 0.6 + 0.1 * epoch}
            if names
            else {}
        )
        for epoch in (1, 2)
    }
    select = {
        "checkpoint": "last", **snapshots["2"], "scores_by_epoch": snapshots, "bank_images": 36 if names else 0,
        "val_images": 9, **({} if names else {"without_knn": NO_LABELS["skipped"]}),
        "words": "k-NN on val went from 60.0 % (epoch 1) to 70.0 % (epoch 2), the highest.",
    }  # fmt: skip
    for name, values in {"data": data, "pretrain": training, "select": select, **found}.items():
        (root / f"metrics/{name}.json").write_text(json.dumps(values), encoding="utf-8")
    with (root / "plots/select.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=SELECT_COLUMNS)
        writer.writeheader()
        writer.writerows(snapshots.values())
    kinds = [f"{kind}{end}" for kind in ("trained", "untrained") for end in ("", "_low", "_high")]
    with (root / "plots/linear.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *kinds])
        writer.writerows([[epoch, *[0.7 + 0.05 * epoch] * 6] for epoch in (1, 2) if names])
    header = ["step", "epoch", "loss", "teacher_entropy", "batch_entropy", "information", "kl", "feature_std",
              "rank_me", "lr", "weight_decay", "ema_momentum", "teacher_temp", "grad_norm"]  # fmt: skip
    with (root / "plots/pretrain.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for step in range(1, 41):
            t = step / 40
            writer.writerow([step, 2 * t, 4.1 - t, 3 - 1.5 * t, 4 - 0.3 * t, 1 + 1.2 * t, 1 + 0.4 * t, 0.1 + 0.1 * t,
                             4 + 5 * t, 5e-4 * t, 0.04 + 0.36 * t, 0.996 + 0.004 * t, 0.04,
                             1 + 0.3 * np.sin(9 * t)])  # fmt: skip
    for seed, name in enumerate(("samples", "crops")):
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"plots/{name}.png")


def _write_model(root: Path) -> None:
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, embed_dim=WIDTH, depth=2, num_heads=2, qkv_bias=True
    )
    params = PretrainConfig(epochs=2, batch=16, warmup_epochs=1, out_dim=PROTOTYPES)
    facts = {
        "format": BACKBONE_FORMAT, "arch": {"family": "vit", **network.arch},
        "seed": 0, "channels": 1, "mean": [0.28], "std": [0.35],
        "params": dict(vars(params)), "data_md5": "d41d8cd98f00b204e9800998ecf8427e", "key": KEY,
    }  # fmt: skip
    save_tensors(root / "models/teacher.safetensors", network.state_dict(), facts)
