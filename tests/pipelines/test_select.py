"""Laws of select on real files: what each snapshot scores, which one is the teacher, when it refuses."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from results_folder import REPOSITORY, make_results

from dino.checkpoint import load_backbone, load_tensors, save_tensors
from dino.distributed import World
from dino.draws import epoch_order
from dino.features import extract_features
from dino.images import ImageTable
from dino.intervals import wilson_interval
from dino.snapshots import snapshots_in
from pipelines import params as settings
from pipelines import paths
from pipelines.stages import select

ALONE = World(0, 1, torch.device("cpu"))
OUTS = [paths.TEACHER, paths.SELECT_METRICS, paths.SELECT_CURVES]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory after pretrain: five snapshots; labels that features can't tell well from each other."""
    make_results(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights, facts = load_tensors(paths.TEACHER)
    for path in OUTS:
        path.unlink()
    for epoch in (1, 2, 3, 4, 6):
        generator = torch.Generator().manual_seed(epoch)
        moved = {name: w + 0.3 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        named = {**facts, "epoch": epoch, "step": 7 * epoch}
        save_tensors(paths.SNAPSHOTS / f"epoch_{epoch:04d}.safetensors", moved, named)
    relabel(lambda row: own(row) if int(row["id"], 16) % 2 else (int(row["id"], 16) % 3, "bag"))
    return tmp_path


def own(row: dict[str, Any]) -> tuple[int, str]:
    return row["label"], row["name"]


def small(**changes: Any) -> settings.Params:
    params = settings.load()
    chosen = {"bank_images": 20, "val_images": 8, "neighbours": 5} | changes
    return params.model_copy(
        update={
            "select": settings.Select(**(params.select.model_dump() | chosen)),
            "embed": params.embed.model_copy(update={"resize_px": 12, "crop_px": 12}),
        }
    )


def run(**changes: Any) -> dict[str, Any]:
    select.select(small(**changes), ALONE)
    return json.loads(paths.SELECT_METRICS.read_text())


def relabel(change: Any) -> None:
    """Rewrite labels.parquet; change(row) gives the new (label, name)."""
    table = pq.read_table(paths.LABELS)
    rows = [row | dict(zip(("label", "name"), change(row), strict=True)) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), paths.LABELS)


def chosen_rows(split: str, most: int, labelled: bool) -> tuple[list[int], list[int | None]]:
    """Rows by the seed's order, as the stage should choose them, and their labels."""
    table = ImageTable(paths.IMAGES[split])
    label = {r["id"]: r["label"] for r in pq.read_table(paths.LABELS).to_pylist() if r["split"] == split}
    known = [row for row in epoch_order(0, 0, len(table)).tolist() if not labelled or label[table.ids[row]] is not None]
    rows = sorted(known[:most])
    return rows, [label[table.ids[row]] for row in rows]


def slow_scores(path: Path) -> dict[str, float]:
    """By loops: k-NN of five, RankMe and spread as their papers write them."""
    backbone, _ = load_backbone(path)
    size = {"resize_px": 12, "crop_px": 12, "batch": 50, "world": ALONE}
    unit = {}
    for split in ("train", "val"):
        features = extract_features(backbone, ImageTable(paths.IMAGES[split]), **size).double().numpy()
        unit[split] = features / np.linalg.norm(features, axis=1, keepdims=True)
    bank_rows, bank_labels = chosen_rows("train", 20, labelled=True)
    val_rows, val_labels = chosen_rows("val", 8, labelled=False)
    right = []
    for row, label in zip(val_rows, val_labels, strict=True):
        cosine = unit["train"][bank_rows] @ unit["val"][row]
        votes = np.zeros(3)
        for neighbour in np.argsort(-cosine)[:5]:
            votes[bank_labels[neighbour]] += np.exp(cosine[neighbour] / 0.07)
        if label is not None:
            right.append(votes.argmax() == label)
    val = unit["val"][val_rows]
    singular = np.linalg.svd(val - val.mean(0), compute_uv=False)
    share = singular / singular.sum()
    low, high = wilson_interval(sum(right), len(right))
    return {
        "val_top1": sum(right) / len(right), "val_top1_low": low, "val_top1_high": high,
        "rank_me": float(np.exp(-(share * np.log(share)).sum())), "feature_std": float(val.std(0).mean()),
    }  # fmt: skip


@pytest.mark.parametrize("unlabelled", [0, 4], ids=["all labelled", "a quarter has no label"])
def test_each_snapshots_scores_are_the_slow_ones(folder: Path, unlabelled: int) -> None:
    if unlabelled:
        gone = {row["id"] for row in pq.read_table(paths.LABELS).to_pylist()[::unlabelled]}
        relabel(lambda row: (None, None) if row["id"] in gone else own(row))
    found = run()
    for epoch, path in snapshots_in(paths.SNAPSHOTS).items():
        expected = slow_scores(path) | {"epoch": epoch, "step": 7 * epoch}
        assert found["scores_by_epoch"][str(epoch)] == pytest.approx(expected, rel=1e-4)
    assert len({scores["val_top1"] for scores in found["scores_by_epoch"].values()}) > 1
    rows = list(csv.DictReader(paths.SELECT_CURVES.read_text().splitlines()))
    assert [{name: float(cell) for name, cell in row.items()} for row in rows] == [
        pytest.approx(scores) for scores in found["scores_by_epoch"].values()
    ]


@pytest.mark.parametrize(("checkpoint", "epoch"), [("last", 6), ("best", 2), (4, 4)])
def test_the_chosen_snapshot_is_the_teacher_and_says_so(folder: Path, checkpoint: str | int, epoch: int) -> None:
    found = run(checkpoint=checkpoint)
    assert (found["epoch"], found["step"], found["checkpoint"]) == (epoch, 7 * epoch, str(checkpoint))
    assert {name: found[name] for name in found["scores_by_epoch"]["2"]} == found["scores_by_epoch"][str(epoch)]
    weights, facts = load_tensors(paths.TEACHER)
    expected, snapshot_facts = load_tensors(snapshots_in(paths.SNAPSHOTS)[epoch])
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in weights)
    assert facts == {
        **snapshot_facts,
        "selected": {"checkpoint": checkpoint, "among": [1, 2, 3, 4, 6]},
        "evaluation": {"resize_px": 12, "crop_px": 12},
    }


def test_of_equally_good_snapshots_best_is_the_latest(folder: Path) -> None:
    weights, facts = load_tensors(paths.SNAPSHOTS / "epoch_0002.safetensors")
    save_tensors(paths.SNAPSHOTS / "epoch_0005.safetensors", weights, {**facts, "epoch": 5, "step": 35})
    assert run(checkpoint="best")["epoch"] == 5


def test_the_test_split_is_not_read(folder: Path) -> None:
    run(checkpoint="best")
    before = [path.read_bytes() for path in OUTS]
    paths.TEST_IMAGES.unlink()
    relabel(lambda row: (None, None) if row["split"] == "test" else own(row))
    run(checkpoint="best")
    assert before == [path.read_bytes() for path in OUTS]


def test_the_teachers_bytes_do_not_depend_on_how_it_was_judged(folder: Path) -> None:
    """So that other labels or another bank rerun nothing after it."""
    run()
    before = paths.TEACHER.read_bytes()
    found = run(bank_images=7, val_images=3, neighbours=2, seed=4)
    assert (found["bank_images"], found["val_images"]) == (7, 3)
    assert paths.TEACHER.read_bytes() == before


def test_snapshots_are_judged_alike_alone_and_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before = [path.read_bytes() for path in OUTS]
    monkeypatch.setattr(select, "TOGETHER", 1)
    run()
    assert before == [path.read_bytes() for path in OUTS]


def test_without_labels_the_last_is_taken_and_has_label_free_scores_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_labels = run()
    relabel(lambda row: (None, None))
    found = run()
    assert found["epoch"] == 6 and found["without_knn"] == "the images have no labels"
    for epoch, scores in found["scores_by_epoch"].items():
        assert scores == {name: with_labels["scores_by_epoch"][epoch][name] for name in scores}
        assert set(scores) == {"epoch", "step", "rank_me", "feature_std"}
    rows = list(csv.DictReader(paths.SELECT_CURVES.read_text().splitlines()))
    assert [(row["val_top1"], row["rank_me"] != "") for row in rows] == [("", True)] * 5
    assert "Without labels no k-NN says which epoch is best" in found["words"]
    assert "select: epoch 6 of 6 is the teacher (last). Without labels" in capsys.readouterr().out
    message = r"select\.checkpoint is best, but the images have no labels: choose last or an epoch \(1, 2, 3, 4, 6\)"
    with pytest.raises(ValueError, match=message):
        run(checkpoint="best")
    relabel(lambda row: (0, "bag") if row["split"] != "val" else (None, None))
    with pytest.raises(ValueError, match=r"is best, but no image of the val split has a label"):
        run(checkpoint="best")


def test_an_epoch_that_was_not_kept_is_refused_with_those_that_were(folder: Path) -> None:
    message = r"select\.checkpoint is 5, an epoch whose teacher was not kept: choose one of 1, 2, 3, 4, 6, or last, or"
    with pytest.raises(ValueError, match=message):
        run(checkpoint=5)
    assert not any(path.exists() for path in OUTS)


def test_more_neighbours_than_the_bank_has_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"select\.neighbours is 21, but the bank has 20 labelled .*at most 20"):
        run(neighbours=21)


def test_a_damaged_snapshot_is_named(folder: Path) -> None:
    (paths.SNAPSHOTS / "epoch_0002.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"epoch_0002\.safetensors is no checkpoint"):
        run()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("bset", r"checkpoint is 'bset': did you mean best\? choose last, best or the number of an epoch"),
        (0, r"checkpoint is 0: the first epoch is 1"),
    ],
)
def test_a_checkpoint_of_no_known_name_is_refused_at_the_door(
    folder: Path, checkpoint: str | int, message: str
) -> None:
    text = paths.PARAMS.read_text()
    assert "  checkpoint: last " in text
    paths.PARAMS.write_text(text.replace("  checkpoint: last ", f"  checkpoint: {checkpoint} "))
    with pytest.raises(ValueError, match=rf"select\.{message}"):
        settings.load()


@pytest.mark.acceptance
def test_two_ranks_write_what_one_writes(folder: Path) -> None:
    run(checkpoint="best")
    before = [path.read_bytes() for path in OUTS]
    for path in OUTS:
        path.unlink()
    script = "import test_select as t; t.on_ranks()"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    places = {"PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}", "DINO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, sys.executable, "-c", script], check=True, env=os.environ | places, timeout=300)
    assert before == [path.read_bytes() for path in OUTS]


def on_ranks() -> None:
    """What each of the ranks does."""
    with World.start() as world:
        select.select(small(checkpoint="best"), world)
