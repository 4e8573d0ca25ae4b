"""Every path of dvc.yaml, once (relative to the working directory, as DVC runs stages), and the real root."""

import os
from pathlib import Path

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")

RAW = Path("data/raw")
TRAIN_IMAGES = Path("data/prepared/train.arrow")
VAL_IMAGES = Path("data/prepared/val.arrow")
TEST_IMAGES = Path("data/prepared/test.arrow")
IMAGES = {"train": TRAIN_IMAGES, "val": VAL_IMAGES, "test": TEST_IMAGES}
LABELS = Path("data/prepared/labels.parquet")
SAMPLES_PICTURE = Path("plots/samples.png")
DATA_METRICS = Path("metrics/data.json")

SNAPSHOTS = Path("models/snapshots")
TRAINING_STATE = Path("models/training_state.safetensors")
PRETRAIN_METRICS = Path("metrics/pretrain.json")
PRETRAIN_CURVES = Path("plots/pretrain.csv")
CROPS_PICTURE = Path("plots/crops.png")

TEACHER = Path("models/teacher.safetensors")
SELECT_METRICS = Path("metrics/select.json")
SELECT_CURVES = Path("plots/select.csv")

FEATURES = Path("features")
KNN_METRICS = Path("metrics/knn.json")
KNN_PREDICTIONS = Path("plots/knn_predictions.csv")
PROBE_METRICS = Path("metrics/probe.json")
LINEAR_METRICS = Path("metrics/linear.json")
LINEAR_CURVE = Path("plots/linear.csv")
REPORT = Path("report")

RUNNING = Path(".work/running")  # a lock of each stage that runs in this working directory
LOGS = Path(".work/logs")  # what each stage said last, where a flow ran it
EXPERIMENT_CLONES = "/.dvc/tmp/exps/"


def features_file(kind: str) -> Path:
    """File of one kind of features: trained, untrained or pixels."""
    return FEATURES / f"{kind}.parquet"


def real_root() -> Path:
    """Root of the user's repository, also from inside DVC's clones for `exp run --temp` and `--queue`.

    Those clones are removed when they succeed: what must outlive them (`.work/`, MLflow's database) lies here.
    DINO_ROOT overrides.
    """
    if root := os.environ.get("DINO_ROOT"):
        return Path(root).resolve()
    return Path(str(Path.cwd().resolve()).split(EXPERIMENT_CLONES)[0])


def work_dir() -> Path:
    """Resumable and volatile state, ignored by git and by DVC: `.work/` at the real root."""
    return real_root() / ".work"
