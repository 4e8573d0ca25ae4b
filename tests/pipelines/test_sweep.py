"""Sweeps by real DVC, on stages that take no time; the acceptance tests run the project's own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import sweep_toy
from toy import wait_until

from pipelines.sweep import reason_of, share
from pipelines.sweeps import schedule as sweep_schedule
from pipelines.sweeps.schedule import Schedule
from pipelines.sweeps.variants import Variant


def ran(root: Path) -> list[str]:
    """What the stages wrote down."""
    path = root / ".work/ran"
    return path.read_text().splitlines() if path.is_file() else []


def test_a_sweep_runs_beside_what_lies_here_and_again_only_what_is_missing(tmp_path: Path) -> None:
    root = sweep_toy.make(tmp_path)
    (root / "toy.py").write_text((root / "toy.py").read_text() + "# not committed\n")
    before = {path: path.read_bytes() for path in root.iterdir() if path.is_file()}
    command = ("pretrain.local_crops=2,3", "--jobs", "2", "--name", "first", "--out", "table.csv")
    done = sweep_toy.sweep(root, *command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "first-local_crops=3: pretrain failed: the loss is not finite; lower pretrain.lr_at_256" in done.stdout
    assert {path: path.read_bytes() for path in before} == before
    assert [line for line in ran(root) if line.startswith("prepare")] == ["prepare lr 0.001 seed 0 crops 2"]
    listed = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps"], cwd=root, capture_output=True, text=True
    ).stdout.split()
    assert listed == ["first-local_crops=2"]
    record = json.loads((root / ".work/sweeps/first/sweep.json").read_text())
    show = ["git", "show", f"{record['variants'][listed[0]]['commit']}:toy.py"]
    script = subprocess.run(show, cwd=root, capture_output=True, text=True).stdout
    assert script.endswith("# not committed\n"), "what was not committed is part of it"
    rows = pd.read_csv(root / "table.csv")
    assert rows["state"].tolist() == ["done", "failed"] and rows["best"].tolist() == [True, False]
    count = len(ran(root))
    again = sweep_toy.sweep(root, "pretrain.local_crops=2", "--name", "first")
    assert again.returncode == 0 and "1 done, 0 to run" in again.stdout, again.stdout + again.stderr
    assert len(ran(root)) == count


@pytest.mark.acceptance
def test_seeds_are_averaged_and_val_decides_where_test_says_otherwise(tmp_path: Path) -> None:
    root = sweep_toy.make(tmp_path)
    values = ("pretrain.lr_at_256=1e-3,5.0e-3", "--seeds", "0,1", "--name", "s")
    done = sweep_toy.sweep(root, *values, "--jobs", "2", "--out", "table.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pd.read_csv(root / "table.csv")
    means = rows[rows["n"].notna()]
    assert means["pretrain.lr_at_256"].tolist() == [0.001, 0.005] and means["n"].tolist() == [2, 2]
    assert means["knn/val_top1_mean"].tolist() == pytest.approx([0.105, 0.505])
    assert means["knn/val_top1_std"].tolist() == pytest.approx([0.0070710678] * 2)
    assert means["best"].tolist() == [False, True], "test is best at the other one"
    assert "50.5 ± 0.7" in done.stdout
    record = json.loads((root / ".work/sweeps/s/sweep.json").read_text())
    assert {variant["state"] for variant in record["variants"].values()} == {"done"}
    edited = (root / "params.yaml").read_text().replace("epochs: 5", "epochs: 6", 1)
    (root / "params.yaml").write_text(edited)
    refused = sweep_toy.sweep(root, *values)
    assert refused.returncode == 1
    assert "the sweep s began with other uncommitted changes" in refused.stderr
    shown = sweep_toy.sweep(root, "--table", "--name", "s")
    assert shown.returncode == 0 and "50.5 ± 0.7" in shown.stdout


@pytest.mark.acceptance
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_trainings_save_leave_no_process_and_go_on(tmp_path: Path, number: int) -> None:
    root = sweep_toy.make(tmp_path)
    command = [sys.executable, "-m", "pipelines.sweep", "pretrain.epochs=64,4", "--name", "k"]
    process = subprocess.Popen(command, cwd=root, env=sweep_toy.environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: "pretrain waits" in ran(root), 60)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(60)
    assert process.returncode == (75 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below), 60)
    assert (root / ".work/saved").read_text() == "whole"
    done = sweep_toy.sweep(root, *command[3:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any((root / ".work/sweeps/k").glob("clones/*"))
    assert len([line for line in ran(root) if line.startswith("prepare")]) == 1, "it comes from the run-cache"


def variants(*settings: dict[str, object]) -> list[Variant]:
    return [Variant(str(number), one) for number, one in enumerate(settings)]


CURRENT = {"data": {"folder": "f"}, "pretrain": {"seed": 0, "epochs": 5}, "embed": {"crop_px": 8}, "knn": {"k": [5]}}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"prepare": (), "pretrain": ("prepare",), "embed": ("pretrain",), "knn": ("embed",), "report": ("knn",)}
    reads = {
        "prepare": ("data",),
        "pretrain": ("pretrain",),
        "embed": ("embed.crop_px",),
        "knn": ("knn",),
        "report": (),
    }
    monkeypatch.setattr(sweep_schedule, "stage_graph", lambda: needs)
    monkeypatch.setattr(sweep_schedule, "stage_params", lambda: reads)


def test_what_two_variants_share_is_what_reads_the_same_settings_all_the_way(graph: None) -> None:
    one = Schedule(variants({"pretrain.seed": 1}, {"pretrain.seed": 2}, {"pretrain.seed": 1, "knn.k": [9]}), CURRENT)
    assert one.shared("0", "1") == {"prepare"}
    assert one.shared("0", "2") == {"prepare", "pretrain", "embed"}, "report reads nothing, but needs knn"


def test_a_variant_waits_until_what_it_shares_is_done(graph: None) -> None:
    both = variants({"knn.k": [1]}, {"knn.k": [2]}, {"pretrain.seed": 3})
    one = Schedule(both, CURRENT)
    assert one.take() is both[0]
    one.begins(both[0], "pretrain")
    assert one.take() is both[2], "the second would train the same again; the third shares the data only"
    one.begins(both[2], "pretrain")
    one.begins(both[0], "knn")
    assert one.take() is both[1]
    assert one.take() is None


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["x", "pretrain failed: no", "cure", "(set DINO_TRACEBACK=1)", "ERROR: 1"], "pretrain failed: no cure"),
        (["x", "ERROR: failed to reproduce 'knn': output lost"], "failed to reproduce 'knn': output lost"),
        (["Killed"], "Killed"),
        ([], "without a word"),
    ],
)  # fmt: skip
def test_a_reason_is_the_stages_own_words(lines: list[str], reason: str) -> None:
    assert reason_of(lines) == reason


def test_gpus_are_shared_out() -> None:
    assert [share("0123", slot, 2) for slot in range(2)] == [{"CUDA_VISIBLE_DEVICES": d} for d in ("0,2", "1,3")]
    assert [share("01", slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    assert share("01", 0, 1) == {} == share("", 1, 2)
