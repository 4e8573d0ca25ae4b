"""Laws of embed, knn, probe and linear on real files: what they write, what they read, when they refuse."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dino.augment import eval_images
from dino.backbones import seeded_backbone
from dino.checkpoint import BACKBONE_FORMAT, load_backbone, save_tensors
from dino.distributed import World
from dino.features import extract_features
from dino.images import ImageTable, write_image_table
from dino.intervals import wilson_interval
from dino.linear import Crops, linear_features, train_linear
from dino.probe import Setting, train_probes
from dino.weights import untrained_backbone
from pipelines import params as settings
from pipelines import paths
from pipelines.evaluation.feature_file import read_features
from pipelines.stages import embed, knn, linear, probe

REPOSITORY = Path(__file__).parents[2]
KINDS = ["trained", "untrained", "pixels"]
NAMES = ["bag", "coat", "nan"]  # a class may be called so
PER_CLASS = {"train": 20, "val": 8, "test": 12}
ARCH = {"family": "vit", "img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
FACTS = {
    "format": BACKBONE_FORMAT, "arch": ARCH, "seed": 1, "channels": 1, "mean": [0.3], "std": [0.4],
    "params": {}, "data_md5": "d41d8cd98f00b204e9800998ecf8427e", "key": "0123456789abcdef",
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))

Label = tuple[int | None, str | None]


def picture(rng: np.random.Generator, label: int) -> bytes:
    """Noise, in which a bar shows the class, not always."""
    pixels = rng.integers(0, 120, (12, 12), dtype=np.uint8)
    pixels[:, 4 * label : 4 * label + 4] += rng.integers(0, 60, dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as prepare and pretrain leave it, with features of it, to be copied."""
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    rows: list[tuple[str, str, int, str, str]] = []
    for split, count in PER_CLASS.items():
        images = []
        for label in [*range(3)] * count:
            data = picture(rng, label)
            images.append((hashlib.md5(data).hexdigest()[:16], data, label))
        images.sort()
        table = root / f"data/prepared/{split}.arrow"
        write_image_table(table, [image[:2] for image in images], channels=1, mean=[0.3], std=[0.4])
        rows += [(image_id, split, label, NAMES[label], f"{split}[{image_id}]") for image_id, _, label in images]
    types = [pa.string(), pa.string(), pa.int64(), pa.string(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)]
    names = ["id", "split", "label", "name", "source"]
    pq.write_table(pa.table(columns, names=names), root / "data/prepared/labels.parquet")
    save_tensors(root / "models/teacher.safetensors", seeded_backbone(ARCH, 2).state_dict(), FACTS)
    text = (REPOSITORY / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("enabled: true", "enabled: false"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        embed.embed(small(settings.load()).embed, batch=50, world=ALONE)
    return root


def small(params: settings.Params, **changes: Any) -> settings.Params:
    """Settings that fit these images; changes: section={name: value}."""
    fitting: dict[str, Any] = {
        "embed": {"resize_px": 12, "crop_px": 12, "pixels_px": 12},
        "knn": {"neighbours": [1, 3, 7, 20]},
        "probe": {"epochs": 5, "batch": 16},
        "linear": {
            "epochs": 6,
            "batch": 16,
            "blocks": 2,
            "patch_average": True,
            "lrs_at_256": [1.0, 10.0, 100.0],
            "scale": (0.9, 1.0),
            "flip": 0.0,
        },
    }
    for section, values in changes.items():
        fitting[section] = fitting[section] | values
    return params.model_copy(
        update={name: getattr(params, name).model_copy(update=values) for name, values in fitting.items()}
    )


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with everything that embed writes."""
    root = tmp_path / "folder"
    shutil.copytree(prepared, root)
    monkeypatch.chdir(root)
    return root


def evaluate(*stages: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """Run knn, probe, linear or several, and read what they wrote."""
    params = small(settings.load(), **changes)
    for stage in stages:
        {"knn": knn, "probe": probe, "linear": linear}[stage].main(params)
    return {stage: json.loads(Path(f"metrics/{stage}.json").read_text()) for stage in stages}


def relabel(change: Any) -> None:
    """Rewrite labels.parquet; change(row) gives the new (label, name)."""
    table = pq.read_table(paths.LABELS)
    rows = [row | dict(zip(("label", "name"), change(row), strict=True)) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), paths.LABELS)


def own(row: dict[str, Any]) -> Label:
    return row["label"], row["name"]


def features_of(kind: str, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of these splits, put together by hand."""
    labels = {(row["split"], row["id"]): row["label"] for row in pq.read_table(paths.LABELS).to_pylist()}
    rows = [row for row in pq.read_table(paths.features_file(kind)).to_pylist() if row["split"] in splits]
    return np.array([row["features"] for row in rows], float), np.array(
        [labels[row["split"], row["id"]] for row in rows]
    )


def slow_knn(bank: tuple[np.ndarray, np.ndarray], queries: np.ndarray, k: int) -> np.ndarray:
    """Predicted labels by loops; no ties here."""
    unit = bank[0] / np.linalg.norm(bank[0], axis=1, keepdims=True)
    found = []
    for query in queries:
        cosine = unit @ query / np.linalg.norm(query)
        votes = np.zeros(3)
        for row in np.argsort(-cosine)[:k]:
            votes[bank[1][row]] += np.exp(cosine[row] / 0.07)
        found.append(votes.argmax())
    return np.array(found)


def test_features_are_the_networks_outputs_in_the_tables_order(folder: Path) -> None:
    trained, facts = load_backbone(paths.TEACHER)
    tables = [ImageTable(path) for path in paths.IMAGES.values()]
    order = [(split, image_id) for split, table in zip(paths.IMAGES, tables, strict=True) for image_id in table.ids]
    for kind, network in {"trained": trained, "untrained": untrained_backbone(facts)}.items():
        found = pq.read_table(paths.features_file(kind))
        assert found.schema.field("features").type == pa.list_(pa.float32(), 16)
        assert json.loads(found.schema.metadata[b"dino"]) == {"kind": kind, "key": "0123456789abcdef"}
        assert list(zip(*(found.column(name).to_pylist() for name in ("split", "id")), strict=True)) == order
        expected = [
            extract_features(network, table, resize_px=12, crop_px=12, batch=50, world=ALONE) for table in tables
        ]
        rows = torch.tensor(found.column("features").to_pylist())
        torch.testing.assert_close(rows, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_pixel_features_are_the_evaluation_image(folder: Path) -> None:
    found = pq.read_table(paths.features_file("pixels"))
    assert json.loads(found.schema.metadata[b"dino"]) == {"kind": "pixels", "key": None}
    pixels = [ImageTable(path).batch(range(len(ImageTable(path)))).pixels_BCHW for path in paths.IMAGES.values()]
    rows = torch.tensor(found.column("features").to_pylist())
    assert torch.equal(rows, torch.cat(pixels).flatten(1))
    assert torch.equal(read_features("pixels").rows_ND, rows.float() / 255)
    embed.embed(small(settings.load(), embed={"pixels_px": 6}).embed, batch=50, world=ALONE)
    smaller = torch.tensor(pq.read_table(paths.features_file("pixels")).column("features").to_pylist())
    quarters = torch.cat(pixels).double().unflatten(2, (6, 2)).unflatten(4, (6, 2)).mean((3, 5)).flatten(1)
    assert (smaller - quarters).abs().mean() < 12  # the same part of the image: bicubic is near the mean of its pixels


def test_feature_files_repeat_to_the_byte_in_groups_of_one_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {kind: paths.features_file(kind).read_bytes() for kind in KINDS}
    embed.embed(small(settings.load()).embed, batch=50, world=ALONE)
    assert before == {kind: paths.features_file(kind).read_bytes() for kind in KINDS}
    for module in (embed, sys.modules["pipelines.evaluation.feature_file"]):
        monkeypatch.setattr(module, "GROUP_ROWS", 25)
    layouts = []
    for batch in (7, 100):
        embed.embed(small(settings.load()).embed, batch=batch, world=ALONE)
        with pq.ParquetFile(paths.features_file("pixels")) as file:
            layouts.append([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    assert layouts == [[25, 25, 10, 24, 25, 11]] * 2


def test_knn_chooses_k_on_val_with_train_and_tests_once_with_train_and_val(folder: Path) -> None:
    (found,) = evaluate("knn").values()
    assert set(found) == {*KINDS, "protocol"}
    for kind in KINDS:
        entry = found[kind]
        train, val, test = (features_of(kind, split) for split in ("train", "val", "test"))
        expected = {k: (slow_knn(train, val[0], k) == val[1]).mean() for k in (1, 3, 7, 20)}
        shares = {k: by_k["top1"] for k, by_k in entry["val_by_k"].items()}
        assert shares == {str(k): pytest.approx(share) for k, share in expected.items()}
        k = max(expected, key=lambda k: (round(expected[k], 9), -k))
        right = (slow_knn(features_of(kind, "train", "val"), test[0], k) == test[1]).sum()
        assert (entry["k"], entry["val_top1"]) == (k, pytest.approx(expected[k]))
        assert entry["test_top1"] == pytest.approx(right / 36)
        assert_interval(entry, "test_", int(right), 36)
    assert found["trained"] != found["untrained"] != found["pixels"]


def assert_interval(entry: dict[str, float], prefix: str, right: int, count: int) -> None:
    """Wilson's stands beside the score."""
    expected = [right / count, *wilson_interval(right, count)]
    assert [entry[f"{prefix}top1{end}"] for end in ("", "_low", "_high")] == pytest.approx(expected)


def test_every_score_has_its_interval_those_on_val_too(folder: Path) -> None:
    for found in evaluate("knn", "probe", "linear").values():
        for kind in found.keys() - {"protocol"}:
            assert_interval(found[kind], "val_", round(24 * found[kind]["val_top1"]), 24)
            assert_interval(found[kind], "test_", round(36 * found[kind]["test_top1"]), 36)
            (table,) = (value for name, value in found[kind].items() if name.startswith("val_by_"))
            assert len(table) >= 3
            for score in table.values():
                assert_interval(score, "", round(24 * score["top1"]), 24)


def test_probe_chooses_on_val_and_tests_once_refitted_on_train_and_val(folder: Path) -> None:
    lrs, dampings = [0.001, 0.3, 3.0], [1e-3, 1.0]
    (found,) = evaluate("probe", probe={"lrs": lrs, "dampings": dampings}).values()
    assert set(found) == {*KINDS, "protocol"}
    settings = [Setting(lr, damping) for damping in dampings for lr in lrs]

    def scores(kind: str, fit_on: list[str], settings: list[Setting], judge_on: str) -> list[float]:
        fit, judge = ([torch.from_numpy(array) for array in features_of(kind, *s)] for s in (fit_on, [judge_on]))
        probes = train_probes(fit[0].float(), fit[1], settings=settings, epochs=5, batch=16, momentum=0.9, seed=0)
        return [right / len(judge[1]) for right in probes.right(judge[0].float(), judge[1])]

    for kind in KINDS:
        entry = found[kind]
        val = dict(zip(settings, scores(kind, ["train"], settings, "val"), strict=True))
        assert {lr: score["top1"] for lr, score in entry["val_by_lr"].items()} == {
            f"{lr:g}": max(val[lr, damping] for damping in dampings) for lr in lrs
        }
        chosen = Setting(entry["lr"], entry["damping"])
        assert entry["val_top1"] == val[chosen] == max(val.values())
        (test,) = scores(kind, ["train", "val"], [chosen], "test")
        assert entry["test_top1"] == test
    assert found["pixels"]["test_top1"] > 0.6


def test_linear_chooses_on_val_and_tests_that_classifier_once(folder: Path) -> None:
    """By the public functions, put together by hand."""
    (found,) = evaluate("linear").values()
    assert set(found) == {"trained", "untrained", "protocol"}
    assert (
        "CLS of the last 2 blocks and the mean patch token," in found["protocol"]
        and "not refitted" in found["protocol"]
    )
    trained, facts = load_backbone(paths.TEACHER)
    labels = {(row["split"], row["id"]): row["label"] for row in pq.read_table(paths.LABELS).to_pylist()}
    tables = {split: ImageTable(path) for split, path in paths.IMAGES.items()}
    actual = {split: torch.tensor([labels[split, i] for i in table.ids]) for split, table in tables.items()}
    normalised = {"mean": [0.3], "std": [0.4]}
    curve = list(csv.DictReader(paths.LINEAR_CURVE.read_text().splitlines()))
    assert [row["epoch"] for row in curve] == [str(epoch) for epoch in range(1, 7)]
    for kind, network in {"trained": trained, "untrained": untrained_backbone(facts)}.items():
        features = linear_features(network, blocks=2, patch_average=True)
        *_, (classifiers,) = train_linear(
            [features], tables["train"], torch.arange(60), actual["train"], world=ALONE, **normalised,
            crops=Crops(12, (0.9, 1.0), (0.75, 4 / 3), 0.0), lrs_at_256=[1.0, 10.0, 100.0], epochs=6, batch=16,
            momentum=0.9, seed=0,
        )  # fmt: skip
        right = {}
        for split in ("val", "test"):
            images = tables[split].batch(range(len(tables[split])))
            with torch.no_grad():
                seen = features(eval_images(images, resize_px=12, crop_px=12, **normalised))
            right[split] = classifiers.right(seen, actual[split])
        entry, best = found[kind], right["val"].index(max(right["val"]))
        assert entry["lr_at_256"] == [1.0, 10.0, 100.0][best]
        assert [round(24 * score["top1"]) for score in entry["val_by_lr_at_256"].values()] == right["val"]
        assert round(36 * entry["test_top1"]) == right["test"][best]
        assert float(curve[-1][kind]) == entry["val_top1"]
        assert float(curve[-1][f"{kind}_high"]) == entry["val_top1_high"]
    assert found["trained"] != found["untrained"]


def test_linear_leaves_out_images_without_a_label_and_counts_unknown_classes_as_wrong(folder: Path) -> None:
    """Two classes to learn, many images without a label, a third class in val and test only."""
    relabel(lambda row: (None, None) if row["split"] == "train" and row["label"] == 2 else own(row))
    (found,) = evaluate("linear", linear={"batch": 4096}).values()
    for kind in ("trained", "untrained"):
        assert found[kind]["test_top1"] <= 24 / 36
        assert found[kind]["val_top1"] <= 16 / 24


def test_a_learning_rate_that_diverges_loses_with_a_word_and_one_at_the_edge_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = evaluate("linear", linear={"lrs_at_256": [1e42, 0.3, 3.0]}).values()
    assert set(found["trained"]["val_by_lr_at_256"]) == {"0.3", "3"}
    assert found["trained"]["diverged"] == ["lr_at_256 1e+42"]
    assert "linear: warning: trained: lr_at_256 1e+42 diverged, which loses" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"diverged with every learning rate; put smaller ones into linear\.lrs_at_256"
    ):
        evaluate("linear", linear={"lrs_at_256": [1e42]})
    evaluate("linear", linear={"lrs_at_256": [1e-6, 1e-9]})
    said = capsys.readouterr().out
    assert re.search(r"warning: trained: lr_at_256 1e-0[69] is the \w+ of linear\.lrs_at_256", said)


def test_linear_refuses_what_does_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"linear\.blocks is 3, the network has 2; choose from 1 to that"):
        evaluate("linear", linear={"blocks": 3})
    pq.write_table(pq.read_table(paths.LABELS).slice(1), paths.LABELS)
    with pytest.raises(
        ValueError, match=r"\w+\.arrow and .*labels\.parquet hold different images, .* `dvc repro prepare`"
    ):
        evaluate("linear")


def test_labels_of_test_images_choose_nothing(folder: Path) -> None:
    before = evaluate("knn", "probe", "linear")
    relabel(lambda row: ((row["label"] + 1) % 3, NAMES[(row["label"] + 1) % 3]) if row["split"] == "test" else own(row))
    after = evaluate("knn", "probe", "linear")
    choice = ("val_top1", "k", "lr", "damping", "lr_at_256", "val_by_k", "val_by_lr", "val_by_lr_at_256")
    for stage, kind in ((name, kind) for name in before for kind in before[name].keys() - {"protocol"}):
        assert [before[stage][kind].get(name) for name in choice] == [after[stage][kind].get(name) for name in choice]
    assert before["knn"]["pixels"]["test_top1"] != after["knn"]["pixels"]["test_top1"]
    assert before["linear"]["trained"]["test_top1"] != after["linear"]["trained"]["test_top1"]


def test_results_repeat_to_the_byte(folder: Path) -> None:
    stages = ("knn", "probe", "linear")
    files = [*(Path(f"metrics/{stage}.json") for stage in stages), paths.KNN_PREDICTIONS, paths.LINEAR_CURVE]
    evaluate(*stages)
    before = [file.read_bytes() for file in files]
    evaluate(*stages)
    assert before == [file.read_bytes() for file in files]


def test_predictions_name_the_classes_of_the_trained_backbones_test_images(folder: Path) -> None:
    (found,) = evaluate("knn").values()
    rows = list(csv.DictReader(paths.KNN_PREDICTIONS.read_text(encoding="utf-8").splitlines()))
    labels = features_of("trained", "test")[1]
    assert [row["actual"] for row in rows] == [NAMES[label] for label in labels]
    right = sum(row["actual"] == row["predicted"] for row in rows)
    assert right / 36 == pytest.approx(found["trained"]["test_top1"])


def test_without_labels_evaluations_are_left_out_with_a_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relabel(lambda row: (None, None))
    found = evaluate("knn", "probe", "linear")
    assert list(found.values()) == [{"skipped": "the images have no labels"}] * 3
    assert paths.LINEAR_CURVE.read_text().count("\n") == 1
    assert paths.KNN_PREDICTIONS.read_text() == "actual,predicted\n"
    said = capsys.readouterr().out
    assert all(f"{stage}: left out: the images have no labels" in said for stage in found)
    relabel(lambda row: (0, "bag") if row["split"] == "train" else (None, None))
    found = evaluate("knn")
    assert found["knn"] == {"skipped": "no image of the val or the test split has a label"}


def test_images_without_a_label_are_left_out(folder: Path) -> None:
    """Half of the test images and a few others have none; the rest is judged as if those were not there."""
    gone = {row["id"] for row in pq.read_table(paths.LABELS).to_pylist()[::3]}
    relabel(lambda row: (None, None) if row["id"] in gone else own(row))
    (partly,) = evaluate("knn").values()
    assert len(paths.KNN_PREDICTIONS.read_text().splitlines()) == 1 + 24
    for file in (paths.LABELS, *map(paths.features_file, KINDS)):
        table = pq.read_table(file)
        kept = [image_id not in gone for image_id in table.column("id").to_pylist()]
        pq.write_table(table.filter(kept), file)
    assert evaluate("knn")["knn"] == partly


def test_a_class_with_one_image_is_judged(folder: Path) -> None:
    first = next(row["id"] for row in pq.read_table(paths.LABELS).to_pylist() if row["split"] == "train")
    relabel(lambda row: (99, "rare") if row["id"] == first else own(row))
    found = evaluate("knn", "probe", "linear")
    assert all(found[stage][kind]["test_top1"] > 0 for stage in found for kind in found[stage].keys() - {"protocol"})


def test_features_and_labels_of_different_images_are_refused(folder: Path) -> None:
    table = pq.read_table(paths.LABELS)
    pq.write_table(table.slice(1), paths.LABELS)
    with pytest.raises(
        ValueError, match=r"trained\.parquet and .*labels\.parquet hold different images: 1 .*dvc repro"
    ):
        evaluate("knn")
    features = pq.read_table(paths.features_file("trained"))
    pq.write_table(features.slice(2), paths.features_file("trained"))
    with pytest.raises(ValueError, match=r"hold different images: 1 .*dvc repro embed"):
        evaluate("probe")


def test_missing_and_foreign_files_are_named_with_their_cure(folder: Path) -> None:
    paths.features_file("pixels").unlink()
    with pytest.raises(ValueError, match=r"no features/pixels\.parquet; `dvc repro embed`"):
        evaluate("knn")
    paths.LABELS.unlink()
    with pytest.raises(ValueError, match=r"labels\.parquet; `dvc repro prepare`"):
        evaluate("knn")
    pq.write_table(pa.table({"a": [1]}), paths.features_file("trained"))
    with pytest.raises(ValueError, match=r"features/trained\.parquet is damaged, or not what .* embed writes"):
        evaluate("knn")


def test_k_larger_than_the_bank_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"knn\.neighbours holds 61, but the bank has 60 .*choose from 1 to 60"):
        evaluate("knn", knn={"neighbours": [5, 61]})


def test_a_diverged_setting_loses_with_a_word(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = evaluate("probe", probe={"lrs": [1e38, 0.3], "dampings": [1e-4]}).values()
    assert (found["trained"]["lr"], set(found["trained"]["val_by_lr"])) == (0.3, {"0.3"})
    assert found["trained"]["diverged"] == ["lr 1e+38 damping 0.0001"]
    assert "probe: warning: trained: lr 1e+38 damping 0.0001 diverged" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"diverged with every setting; put smaller ones into probe\.lrs"):
        evaluate("probe", probe={"lrs": [1e38], "dampings": [1e-4]})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"crop_px": 10}, r"embed\.crop_px \(10\) is not divisible by the patch size \(4 px\) .*choose 8 or 12"),
        ({"crop_px": 3}, r"embed\.crop_px \(3\) is not divisible .*choose 4$"),
        ({"crop_px": 16}, r"embed\.crop_px \(16\) is larger than embed\.resize_px \(12\)"),
        ({"pixels_px": 65}, r"embed\.pixels_px \(65\) makes 4,225 numbers .*choose at most 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(folder: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed.embed(small(settings.load(), embed=sizes).embed, batch=50, world=ALONE)


def test_images_of_other_channels_and_a_diverged_network_are_refused(folder: Path) -> None:
    before = paths.features_file("trained").read_bytes()
    sizes = small(settings.load()).embed
    weights, facts = load_backbone(paths.TEACHER)[0].state_dict(), FACTS
    save_tensors(paths.TEACHER, weights | {"norm.bias": torch.full((16,), torch.nan)}, facts)
    with pytest.raises(ValueError, match=r"the trained network gives features that are not finite.*lr_at_256"):
        embed.embed(sizes, batch=50, world=ALONE)
    save_tensors(paths.TEACHER, seeded_backbone(ARCH | {"in_chans": 3}, 2).state_dict(),
                 facts | {"channels": 3, "arch": ARCH | {"in_chans": 3}})  # fmt: skip
    with pytest.raises(ValueError, match=r"trained on images of 3 channel.*have 1; `dvc repro pretrain`"):
        embed.embed(sizes, batch=50, world=ALONE)
    assert paths.features_file("trained").read_bytes() == before
    assert sorted(file.name for file in paths.FEATURES.iterdir()) == [
        "pixels.parquet",
        "trained.parquet",
        "untrained.parquet",
    ]


@pytest.mark.acceptance  # tests/dino tells it of features and of the linear training
def test_two_ranks_write_what_one_writes(folder: Path) -> None:
    one = evaluate("knn", "linear")
    shutil.rmtree("features")
    shutil.rmtree("metrics")
    script = "import test_evaluate as t; t.on_ranks()"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    places = {"PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}", "DINO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, sys.executable, "-c", script], check=True, env=os.environ | places, timeout=300)
    assert json.loads(Path("metrics/knn.json").read_text()) == one["knn"]
    assert json.loads(Path("metrics/linear.json").read_text()) == one["linear"]


def on_ranks() -> None:
    """What each of the ranks does."""
    params = small(settings.load())
    with World.start() as world:
        embed.embed(params.embed, batch=50, world=world)
        knn.knn(params, world)
        linear.linear(params, world)
