"""The whole pipeline, really run by DVC on a tiny data set (scikit-learn's digits) in scratch clones."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_settings import TINY

import dino
from dino.images import ImageTable
from pipelines.processes.scratch import copy_repository

ROOT = Path(__file__).parents[1]
STAGES = ["fetch", "prepare", "pretrain", "select", "embed", "knn", "probe", "linear", "report"]


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user's terminal would run it, with this interpreter's `python` and `dvc` first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("DINO_", "MLFLOW_", "DVC_"))}
    return subprocess.run(
        command,
        cwd=folder,
        env={**outside, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def scratch_clone(folder: Path, tracking: bool = True) -> Path:
    """The working tree as it stands, in a git repository of its own, with tiny settings."""
    copy_repository(folder, TINY | {"runtime": {"tracking": {"enabled": tracking}}}, root=ROOT)
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has run."""
    folder = scratch_clone(tmp_path_factory.mktemp("first"))
    done = run(folder, "dvc", "repro", PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def outs(folder: Path) -> dict[str, str]:
    """md5 of every out and metric that DVC recorded."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


def test_every_stage_runs_and_scores_stand_in_the_metrics(first: Path) -> None:
    lock = yaml.safe_load((first / "dvc.lock").read_text())
    assert sorted(lock["stages"]) == sorted(STAGES)
    for name in ("knn", "probe", "linear"):
        metrics = json.loads((first / f"metrics/{name}.json").read_text())
        for kind in ("trained", "untrained", *["pixels"] * (name != "linear")):
            for split in ("val", "test"):
                low, top1, high = (metrics[kind][f"{split}_top1{end}"] for end in ("_low", "", "_high"))
                assert 0 <= low < top1 < high <= 1
    assert "<html" in (first / "report/index.html").read_text()


def test_the_loaded_teacher_gives_the_features_of_stage_embed(first: Path) -> None:
    """The transform is the pipeline's, its sizes travel in the checkpoint."""
    model = dino.load(first / "models/teacher.safetensors")
    assert (model.transform.resize_px, model.transform.crop_px) == (8, 8)
    features = pq.read_table(first / "features/trained.parquet").to_pydict()
    images = ImageTable(first / "data/prepared/test.arrow")
    rows = [row for row, split in enumerate(features["split"]) if split == "test"]
    assert [features["id"][row] for row in rows] == images.ids
    expected = torch.tensor([features["features"][row] for row in rows])
    found = model([images.encoded(row) for row in range(len(images))])
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_nothing_reruns_when_nothing_changed(first: Path) -> None:
    again = run(first, "dvc", "repro")
    assert again.returncode == 0
    assert "up to date" in again.stdout
    assert "Running stage" not in again.stdout


@pytest.mark.acceptance  # of data, pretraining and teacher `make test` says so too: benchmarks/test_kill.py
def test_another_directory_process_and_hash_seed_give_the_same_bytes(
    first: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And no MLflow beside it."""
    second = scratch_clone(tmp_path_factory.mktemp("a-second-place"), tracking=False)
    done = run(second, "dvc", "repro", PYTHONHASHSEED="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"Running stage '(\w+)'", done.stdout) == STAGES, "a stage came from a cache, or in another order"
    assert outs(second) == outs(first)


@pytest.mark.acceptance
def test_every_stage_run_anew_is_verified_and_other_threads_are_told_apart(first: Path) -> None:
    done = run(first, sys.executable, "-m", "pipelines.verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"verify: (\w+) executed in", done.stdout) == STAGES
    assert "outs are identical to dvc.lock" in done.stdout.splitlines()[-1]
    other = run(first, sys.executable, "-m", "pipelines.verify", "pretrain", OMP_NUM_THREADS="2")
    assert other.returncode == 1
    assert re.search(
        r"pretrain: models/snapshots differs: epoch_0001.safetensors: tensor .*, by .* at most", other.stdout
    )


def test_a_setting_of_the_evaluation_reruns_no_training(first: Path) -> None:
    plan = run(first, "dvc", "repro", "--dry", "knn")
    assert "Running stage" not in plan.stdout
    edit(first, lambda settings: settings["knn"].update(temperature=0.1))
    try:
        plan = run(first, "dvc", "repro", "--dry")
        assert re.findall(r"Running stage '(\w+)'", plan.stdout) == ["knn"]
        edit(first, lambda settings: settings["runtime"]["pretrain"].update(save_minutes=9.0))
        assert re.findall(r"Running stage '(\w+)'", run(first, "dvc", "repro", "--dry").stdout) == ["knn"]
    finally:
        run(first, "git", "checkout", "params.yaml")


@pytest.mark.acceptance
def test_the_flow_finds_everything_up_to_date(first: Path) -> None:
    flow = run(first, sys.executable, "-m", "pipelines.flow")
    assert flow.returncode == 0, flow.stdout + flow.stderr
    for stage in STAGES:
        assert re.search(rf"{stage} .*unchanged", flow.stdout + flow.stderr), flow.stdout + flow.stderr


@pytest.mark.acceptance
def test_an_experiment_is_one_more_row_to_compare(first: Path) -> None:
    done = run(first, "dvc", "exp", "run", "-S", "probe.epochs=3", "--name", "short-probe")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = run(first, "dvc", "exp", "show", "--csv")
    assert "short-probe" in shown.stdout
    difference = run(first, "dvc", "metrics", "diff", "--json")
    assert "metrics/probe.json" in difference.stdout


def test_a_wrong_setting_is_one_clear_error_and_loses_nothing(first: Path) -> None:
    edit(first, lambda settings: settings["pretrain"].update(arch="vit_smal", epoch=3))
    before = outs(first)
    try:
        failed = run(first, "dvc", "repro")
    finally:
        run(first, "git", "checkout", "params.yaml")
    assert failed.returncode != 0
    said = failed.stdout + failed.stderr
    assert "did you mean pretrain.epochs?" in said
    assert "Traceback" not in said
    assert outs(first) == before
    run(first, "dvc", "checkout", "-f")


@pytest.mark.acceptance
def test_a_recipe_runs_beside_what_lies_here(first: Path, tmp_path: Path) -> None:
    """With images of one's own, without labels; another start under the same name is refused."""
    photos = tmp_path / "my photos, 1"
    photos.mkdir()
    for number, path in enumerate(sorted((first / "data/raw/digits").rglob("*.png"))[:60]):
        shutil.copy(path, photos / f"{number}.png")
    assert len(list(photos.iterdir())) == 60
    small = {
        "pretrain.epochs": 2, "pretrain.batch": 8, "pretrain.patch_size": 4, "pretrain.embed_dim": 24,
        "pretrain.depth": 2, "pretrain.num_heads": 3, "pretrain.out_dim": 32, "pretrain.hidden_dim": 16,
        "pretrain.bottleneck_dim": 8, "pretrain.global_px": 8, "pretrain.local_px": 4, "pretrain.warmup_epochs": 0.5,
        "pretrain.teacher_temp_warmup_epochs": 1, "pretrain.freeze_last_layer_epochs": 0.5, "embed.resize_px": 8,
        "embed.crop_px": 8, "embed.pixels_px": 8,
    }  # fmt: skip
    options = [part for name, value in small.items() for part in ("-S", f"{name}={value}")]
    command = (sys.executable, "-m", "pipelines.recipe", "own-photos", "--data", str(photos), *options)
    before = outs(first), (first / "params.yaml").read_bytes(), (first / "models/teacher.safetensors").read_bytes()
    done = run(first, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`dvc exp apply own-photos` brings" in done.stdout and "select: epoch 2 of 2 is the teacher" in done.stdout
    assert "own-photos" in run(first, "dvc", "exp", "list", "--name-only").stdout.split()
    after = outs(first), (first / "params.yaml").read_bytes(), (first / "models/teacher.safetensors").read_bytes()
    assert before == after
    again = run(first, *command)
    assert again.returncode == 1 and "an experiment own-photos stands on this commit already" in again.stderr
    applied = run(first, "dvc", "exp", "apply", "own-photos")
    try:
        assert applied.returncode == 0, applied.stderr
        settings = yaml.safe_load((first / "params.yaml").read_text())
        assert settings["data"]["folder"] == str(photos) and settings["pretrain"]["ema_momentum"] == 0.99
        assert settings["embed"]["crop_px"] == 8
    finally:
        run(first, "git", "checkout", ".")
        run(first, "dvc", "checkout", "-f")


def edit(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Change the clone's params.yaml."""
    path = folder / "params.yaml"
    settings = yaml.safe_load(path.read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))
