"""prepare: tables that depend on the images only, labels apart, and nothing lost in silence."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dino.decode import content_id, open_image
from dino.images import ImageTable
from pipelines import paths
from pipelines.data.datasets import NAMED
from pipelines.data.examine import Limits
from pipelines.data.png import encode_png
from pipelines.stages.fetch import FETCH, fetch
from pipelines.stages.prepare import prepare

LIMITS = Limits(512, 10**6, 10.0)
SETTINGS: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.2, "limits": LIMITS, "seed": 0}
Files = dict[str, bytes]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    return tmp_path


@pytest.fixture
def prepared(place: Path) -> Callable[..., "Outs"]:
    """Write files into a folder, prepare it, and read all that came out."""

    def run(files: Files, **settings: Any) -> Outs:
        shutil.rmtree(place / "mine", ignore_errors=True)
        for name, data in files.items():
            (place / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "mine" / name).write_bytes(data)
        prepare(place / "mine", **(SETTINGS | settings))
        return Outs()

    return run


class Outs:
    """Everything a run of prepare wrote."""

    def __init__(self) -> None:
        self.files = {path.name: path.read_bytes() for path in (*paths.IMAGES.values(), paths.LABELS)}
        self.tables = {split: ImageTable(path) for split, path in paths.IMAGES.items()}
        self.labels = pd.read_parquet(paths.LABELS)
        self.metrics = json.loads(paths.DATA_METRICS.read_text())
        self.picture = paths.SAMPLES_PICTURE.read_bytes()

    def tables_bytes(self) -> list[bytes]:
        return [self.files[path.name] for path in paths.IMAGES.values()]

    def names(self) -> dict[str, str | None]:
        return dict(zip(self.labels["source"], self.labels["name"], strict=True))

    def splits(self) -> dict[str, str]:
        """Content id -> split."""
        return {image_id: split for split, table in self.tables.items() for image_id in table.ids}


def png(number: int, *shape: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, shape or (8, 8), dtype=np.uint8))


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


CLASSES: Files = {f"{'cat' if i % 3 else 'dog'}/{i}.png": png(i) for i in range(60)}
FLAT: Files = {f"{i}.png": png(i) for i in range(20)}


def test_tables_labels_and_metrics_tell_the_same(prepared: Callable[..., Outs]) -> None:
    outs = prepared(CLASSES)
    assert {split: len(table) for split, table in outs.tables.items()} == {"train": 43, "val": 5, "test": 12}
    assert outs.labels["id"].tolist() == [image_id for table in outs.tables.values() for image_id in table.ids]
    assert outs.labels["split"].tolist() == ["train"] * 43 + ["val"] * 5 + ["test"] * 12
    for table in outs.tables.values():
        assert table.ids == sorted(table.ids)
        assert table.channels == 1
        for row, image_id in enumerate(table.ids):
            (label,) = outs.labels[outs.labels["id"] == image_id].itertuples()
            assert CLASSES[label.source] == table.encoded(row) and content_id(table.encoded(row)) == image_id
            assert (label.label, label.name) == ((0, "cat") if "cat" in label.source else (1, "dog"))
    train = outs.tables["train"]
    pixels = np.stack([np.asarray(open_image(train.encoded(row))) for row in range(43)]) / 255
    for table in outs.tables.values():
        np.testing.assert_allclose([*table.mean, *table.std], [pixels.mean(), pixels.std()], rtol=1e-12)
    metrics = outs.metrics
    assert metrics["images"] == {"train": 43, "val": 5, "test": 12}
    assert metrics["classes"] == 2 and metrics["channels"] == 1
    assert metrics["class_balance"]["test"] == {"cat": 8, "dog": 4}
    assert (metrics["mean"], metrics["std"]) == (train.mean, train.std)
    assert Image.open(io.BytesIO(outs.picture)).format == "PNG"
    assert not list(Path().rglob("*.part*"))


def mixed() -> Files:
    """With some that are shrunk, and a broken one."""
    files = CLASSES | {f"cat/large{i}.jpg": encode(open_image(png(i, 90, 70, 3)), "JPEG") for i in range(80)}
    return files | {"dog/broken.png": b"broken"}


def laid(folder: Path, files: Files, *, backwards: bool) -> Path:
    """The files, created in order of their names or against it."""
    for name in sorted(files, reverse=backwards):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name])
    return folder


def written(run: Path) -> dict[str, bytes]:
    """All that a run left."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


OUTS = {str(path) for path in (*paths.IMAGES.values(), paths.LABELS, paths.DATA_METRICS, paths.SAMPLES_PICTURE)}


def test_another_place_and_order_of_the_files_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in range(2):
        run = tmp_path / f"run{number}"
        run.mkdir()
        monkeypatch.chdir(run)
        folder = laid(tmp_path / f"images {number}", mixed(), backwards=bool(number))
        prepare(folder, **SETTINGS | {"limits": Limits(40, 10**6, 10.0)})
        found.append(written(run))
    assert found[0].keys() == OUTS
    assert found[0] == found[1]


SCRIPT = """
import sys
from pathlib import Path
from pipelines.data.examine import Limits
from pipelines.stages.prepare import prepare
prepare(Path(sys.argv[1]), val_fraction=.1, test_fraction=.2, limits=Limits(40, 10**6, 10.0), seed=0)
"""


@pytest.mark.acceptance
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Other hash seeds, another place, files created in another order, with shrinking and a broken file."""
    runs = []
    for seed in ("1", "2"):
        folder, run = laid(tmp_path / f"images {seed}", mixed(), backwards=seed == "2"), tmp_path / f"run{seed}"
        run.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        runs.append((run, subprocess.Popen(command, cwd=run, env=environment, stdout=subprocess.DEVNULL)))
    assert [process.wait(timeout=300) for _, process in runs] == [0, 0]
    assert written(runs[0][0]) == written(runs[1][0])


def test_labels_do_not_touch_the_tables(prepared: Callable[..., Outs]) -> None:
    before = prepared(CLASSES)
    after = prepared({name.replace("dog/", "a wolf/"): data for name, data in CLASSES.items()})
    assert before.tables_bytes() == after.tables_bytes()
    assert set(after.labels["name"]) == {"cat", "a wolf"}
    assert after.labels["label"].tolist() == [1 - label for label in before.labels["label"]]


def test_an_image_more_less_or_other_moves_few_others(prepared: Callable[..., Outs]) -> None:
    before = prepared(CLASSES).splits()
    new = png(1000)
    others = (
        CLASSES | {"dog/new.png": new},
        {name: data for name, data in CLASSES.items() if name != "dog/0.png"},
        CLASSES | {"dog/0.png": new},
    )
    for files in others:
        outs = prepared(files)
        after = outs.splits()
        expected = {content_id(data) for data in files.values()}
        assert after.keys() == expected
        assert sum(before[i] != after[i] for i in before.keys() & after.keys()) <= 4


def test_splits_of_the_folder_are_kept(prepared: Callable[..., Outs]) -> None:
    files = {f"train/{name}": data for name, data in CLASSES.items()}
    files |= {f"test/cat/{i}.png": png(100 + i) for i in range(7)} | {
        f"val/dog/{i}.png": png(200 + i) for i in range(3)
    }
    outs = prepared(files)
    assert outs.metrics["images"] == {"train": 60, "val": 3, "test": 7}
    assert all(
        source.startswith(split) for split, source in zip(outs.labels["split"], outs.labels["source"], strict=True)
    )
    del files["val/dog/0.png"], files["val/dog/1.png"], files["val/dog/2.png"]
    assert prepared(files).metrics["images"] == {"train": 54, "val": 6, "test": 7}


def test_without_labels(prepared: Callable[..., Outs]) -> None:
    outs = prepared(FLAT)
    assert outs.metrics["classes"] is None and outs.metrics["class_balance"] is None
    assert outs.metrics["images"] == {"train": 14, "val": 2, "test": 4}
    assert outs.labels["label"].isna().all() and outs.labels["name"].isna().all()
    assert sorted(outs.labels["source"]) == sorted(FLAT)


def test_broken_files_are_named_and_counted(prepared: Callable[..., Outs], capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"cat/cut.png": png(0)[:60], "cat/empty.jpg": b"", "dog/page.jpg": b"<html>"}
    outs = prepared(CLASSES | broken | {"readme.txt": b"hello"})
    told = capsys.readouterr().out
    assert "warning: 3 of 63 images can't be read and are left out" in told
    for name in broken:
        assert name in told
    assert (outs.metrics["broken"], outs.metrics["other_files"]) == (3, 1)
    assert outs.tables_bytes() == prepared(CLASSES).tables_bytes()


def test_more_than_half_broken_is_an_error(prepared: Callable[..., Outs]) -> None:
    broken = {f"{name}x.png": b"<html>" for name in FLAT}
    prepared(FLAT | broken)
    with pytest.raises(
        ValueError, match=r"21 of 41 images can't be read; is the copy or download complete\?.*and 11 more"
    ):
        prepared(FLAT | broken | {"one more.png": b""})


def test_copies_are_kept_once_and_test_images_leave_train(
    prepared: Callable[..., Outs], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"train/{name}": data for name, data in CLASSES.items()}
    files |= {f"test/{name}": data for name, data in list(CLASSES.items())[:6]}  # leaked
    files |= {"train/cat/copy.png": CLASSES["cat/10.png"], "train/dog/copy.png": CLASSES["cat/11.png"]}
    outs = prepared(files)
    duplicates = outs.metrics["duplicates"]
    assert {kind: count for kind, count in duplicates.items() if count} == {
        "train_in_test": 6,
        "within_train": 2,
        "label_conflicts": 1,
    }
    assert outs.metrics["images"] == {"train": 49, "val": 5, "test": 6}
    assert len(outs.splits()) == 60
    assert "warning: 6 training images that are test images too: left out" in capsys.readouterr().out


def test_grey_only_if_all_images_are(prepared: Callable[..., Outs]) -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = {
        "bits.png": encode(Image.fromarray(ramp > 99), "PNG"),
        "sixteen.png": encode(ramp.astype(np.uint16) * 257, "PNG"),
        "alpha.png": encode(Image.fromarray(np.stack([ramp, 255 - ramp], 2), "LA"), "PNG"),
        "jpeg.jpg": encode(ramp, "JPEG"),
        "tiff.tif": encode(ramp, "TIFF"),
    }
    outs = prepared(FLAT | grey)
    assert outs.metrics["channels"] == 1 and outs.metrics["grey"] == 25
    outs = prepared(FLAT | grey | {"one.gif": encode(np.stack([ramp, ramp, 255 - ramp], 2), "GIF")})
    assert outs.metrics["channels"] == 3 and outs.metrics["grey"] == 25
    assert outs.tables["train"].batch([0]).pixels_BCHW.shape[1] == 3
    assert len(outs.tables["train"].mean) == 3


def test_original_bytes_are_stored_unless_the_image_is_too_large(prepared: Callable[..., Outs]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encode(np.asarray(open_image(png(7, 40, 60, 3))), "JPEG", exif=exif)
    files = FLAT | {"lying.jpg": lying}
    (stored,) = [
        (table.encoded(row), table.batch([row]).sizes_B2.tolist())
        for table in prepared(files).tables.values()
        for row in range(len(table))
        if table.ids[row] == content_id(lying)
    ]
    assert stored == (lying, [[60, 40]]), "upright: 60 high"
    outs = prepared(files, limits=LIMITS._replace(short_px=20))
    assert outs.metrics["shrunk"] == 1
    assert outs.metrics["height_px"] == {"smallest": 8, "median": 8, "largest": 30}
    assert outs.metrics["width_px"] == {"smallest": 8, "median": 8, "largest": 20}


def test_dark_sixteen_bit_files_are_pointed_out(
    prepared: Callable[..., Outs], capsys: pytest.CaptureFixture[str]
) -> None:
    twelve_bits = {f"{i}.tif": encode(np.full((8, 8), 4000 + i, np.uint16), "TIFF") for i in range(5)}
    prepared(twelve_bits)
    assert (
        "the brightest pixel of all images is 16 of 255; where 16-bit files hold fewer bits" in capsys.readouterr().out
    )


def test_too_few_images(prepared: Callable[..., Outs]) -> None:
    with pytest.raises(ValueError, match="whose 2 different images leave none for val; add images"):
        prepared({"1.png": png(1), "2.png": png(2), "copy.png": png(2)})
    assert prepared({f"{i}.png": png(i) for i in range(3)}).metrics["images"] == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(ValueError, match="leave none for train"):
        prepared({"train/1.png": png(1), "test/1.png": png(1)})


def test_a_failure_leaves_what_was_there(prepared: Callable[..., Outs]) -> None:
    before = prepared(CLASSES).files
    with pytest.raises(ValueError):
        prepared({"1.png": b"broken"})
    assert Outs().files == before


def test_digits_as_a_named_set_keep_all_their_images(place: Path) -> None:
    fetch(Path("data/raw/digits"))
    (place / "repository/data/raw/digits/train/0/copy.png").write_bytes(
        (place / "repository/data/raw/digits/test/0/0000.png").read_bytes()
    )
    prepare(Path("data/raw/digits"), **SETTINGS)
    outs = Outs()
    assert outs.metrics["images"] == {"train": 1294, "val": 144, "test": 360}
    assert outs.metrics["duplicates"]["train_in_test"] == 1
    assert sum("-" in image_id for image_id in outs.labels["id"]) == 1
    assert outs.labels["id"].is_unique


def test_what_can_be_fetched_can_be_read() -> None:
    assert FETCH.keys() == NAMED.keys()


@pytest.mark.acceptance
def test_the_real_fashion_mnist(place: Path) -> None:
    fetch(Path("data/raw/fashion-mnist"))
    prepare(Path("data/raw/fashion-mnist"), **SETTINGS)
    outs = Outs()
    assert outs.metrics["images"] == {"train": 54000, "val": 6000, "test": 10000}
    assert set(outs.metrics["class_balance"]["val"].values()) == {600}
    assert outs.labels["id"].is_unique and outs.labels["label"].notna().all()
    np.testing.assert_allclose([*outs.metrics["mean"], *outs.metrics["std"]], [0.2860, 0.3530], atol=5e-4)
    table = outs.tables["test"]
    pixels_NHW = table.batch(range(10000)).pixels_BCHW[:, 0].numpy()
    raw = np.fromfile(paths.RAW / "fashion-mnist/t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    raw_labels = np.fromfile(paths.RAW / "fashion-mnist/t10k-labels-idx1-ubyte", np.uint8)[8:]
    test = outs.labels[outs.labels["split"] == "test"]
    order = test["source"].str.extract(r"\[(\d+)\]")[0].astype(int).to_numpy()
    np.testing.assert_array_equal(pixels_NHW, raw[order])
    np.testing.assert_array_equal(test["label"], raw_labels[order])
