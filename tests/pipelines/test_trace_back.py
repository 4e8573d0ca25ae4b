"""The commands that `pipelines.trace` prints, run as they are in a fresh clone, give the same checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow_witness as witness
import pytest
import yaml

from pipelines.processes.scratch import copy_repository

pytestmark = [pytest.mark.acceptance, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROJECT = Path(__file__).parents[2]
TINY = {
    "data": {"folder": "data/raw/digits"},
    "pretrain": {
        "epochs": 1, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "out_dim": 64, "hidden_dim": 32,
        "bottleneck_dim": 16, "global_px": 8, "local_px": 4, "warmup_epochs": 0.5,
    },
    "embed": {"resize_px": 8, "crop_px": 8, "pixels_px": 8},
    "knn": {"neighbours": [1, 5]},
    "probe": {"epochs": 2, "lrs": [1.0]},
    "linear": {"blocks": 1, "epochs": 1, "lrs_at_256": [1.0]},
}  # fmt: skip


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command as in a terminal of one thread."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("DINO_", "MLFLOW_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = outside | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    root.mkdir()
    copy_repository(root, TINY, root=PROJECT)
    return root


def change(root: Path, **pretraining: object) -> None:
    """Edit params.yaml without a commit."""
    path = root / "params.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["pretrain"] |= pretraining
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def teacher_md5(root: Path) -> str:
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    return next(out["md5"] for out in lock["stages"]["select"]["outs"] if out["path"] == "models/teacher.safetensors")


def brought_back(root: Path, name: str, *options: str) -> tuple[Path, str]:
    """Run what trace prints; the clone, and what was said."""
    clone = root.parent / "back"
    script = run(root, sys.executable, "-m", "pipelines.trace", name, "--into", str(clone), *options)
    assert script.returncode == 0, script.stderr
    (root.parent / "back.sh").write_text(script.stdout)
    done = run(root.parent, "sh", "-e", "back.sh")
    assert done.returncode == 0, script.stdout + done.stdout + done.stderr
    return clone, done.stdout


def test_a_row_with_uncommitted_settings_comes_back_without_any_cache(repository: Path) -> None:
    change(repository, lr_at_256=2.0e-3)
    done = run(repository, "dvc", "repro", "select")
    assert done.returncode == 0, done.stdout + done.stderr
    (mine,) = witness.runs(repository)
    assert mine.data.tags["git.dirty"] == "true"
    wanted = teacher_md5(repository)
    change(repository, lr_at_256=9.0e-3)  # since then
    clone, said = brought_back(repository, mine.info.run_id, "--anew")
    assert "Running stage 'pretrain'" in said, "it was computed again"
    assert teacher_md5(clone) == wanted and "models/teacher.safetensors: OK" in said
    (theirs,) = witness.runs(clone)
    assert theirs.data.tags["dino.key"] == mine.data.tags["dino.key"]


def test_a_sweeps_rows_name_experiment_and_sweep_and_come_back_from_the_cache(repository: Path) -> None:
    change(repository, out_dim=48)
    command = [sys.executable, "-m", "pipelines.sweep", "pretrain.seed=0,1", "--name", "s", "--jobs", "2"]
    done = run(repository, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {one.data.tags["dvc.exp_name"]: one for one in witness.runs(repository)}
    assert set(rows) == {"s-seed=0", "s-seed=1"}
    assert {one.data.tags["dino.sweep"] for one in rows.values()} == {"s"}
    assert {one.data.params["pretrain.out_dim"] for one in rows.values()} == {"48"}
    shown = run(repository, "dvc", "exp", "show", "--csv").stdout
    assert all(re.search(rf"^{name},", shown, re.MULTILINE) for name in rows)
    clone, said = brought_back(repository, "s-seed=1")
    assert "Running stage" not in said, "all of it lies in the cache"
    assert teacher_md5(clone) == rows["s-seed=1"].data.tags["dvc.models/teacher.safetensors"]
    assert run(clone, "dvc", "exp", "list", "--all-commits", "--name-only").stdout.split() == ["s-seed=1"]
