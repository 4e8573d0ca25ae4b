"""`python -m pipelines.look`: pictures of one's own images, whatever their size and mode; the same bytes again."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pretrained import encoded, pixels, write_checkpoint
from tiny import digits

import dino
from dino.pretrained import read_image
from pipelines.embed import embed_folder
from pipelines.evaluation.embedded import read_embedded
from pipelines.look import distinct, look_at

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "teacher.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wide colour, high 16-bit grey, and one with alpha of the same name."""
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / "wide.png", folder / "high.png", folder / "more" / "wide.png"]
    files[2].parent.mkdir()
    files[0].write_bytes(encoded(pixels(20, 55)))
    files[1].write_bytes(encoded(np.uint16(np.add.outer(700 * np.arange(60), 900 * np.arange(16)))))
    files[2].write_bytes(encoded(Image.fromarray(pixels(30, 30)).convert("RGBA")))
    return files


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.md5(file.read_bytes()).hexdigest() for file in files}


def test_each_image_has_its_pictures_in_its_proportions(tmp_path: Path, photos: list[Path], checkpoint: Path) -> None:
    look_at(photos, tmp_path / "out", checkpoint, px=20)
    names = ["attention.png", "head-1.png", "head-2.png", "image.png", "patches-pca.png"]
    found = contents(tmp_path / "out")
    assert set(found) == {"sheet.png", *(f"{folder}/{name}" for folder in ("wide", "high", "wide-2") for name in names)}
    for folder, grid in (("wide", (5, 13)), ("high", (18, 5)), ("wide-2", (5, 5))):
        sizes = {read_image(tmp_path / "out" / folder / name).size for name in names}
        assert len(sizes) == 1
        width, height = sizes.pop()
        assert height * grid[1] == width * grid[0] and max(width, height) > 300
    look_at(photos[:1], tmp_path / "once", checkpoint, px=20)
    look_at(photos[:1], tmp_path / "again", checkpoint, px=20)
    assert contents(tmp_path / "again") == contents(tmp_path / "once")


def test_the_nearest_images_are_those_of_the_slow_loop_without_the_image_itself(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, like = tmp_path / "images", tmp_path / "features.parquet"
    folder.mkdir()
    for number, data in enumerate(digits(9, 16, 20)):
        (folder / f"{number}.png").write_bytes(data)
    embed_folder(folder, like, checkpoint, device=CPU)
    capsys.readouterr()
    look_at([folder / "3.png"], tmp_path / "out", checkpoint, like=like, neighbours=3)
    rows = read_embedded(like).rows_ND
    query = dino.load(checkpoint)(folder / "3.png")
    cosines = [float(query @ row / (query.norm() * row.norm())) for row in rows]
    expected = sorted(set(range(9)) - {3}, key=lambda row: -cosines[row])[:3]
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith(", ".join(f"{row}.png ({cosines[row]:.2f})" for row in expected))
    assert (tmp_path / "out/3/nearest-3.png").is_file()

    other = write_checkpoint(tmp_path / "other.safetensors", mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="features of another checkpoint"):
        look_at([folder / "3.png"], tmp_path / "out", other, like=like)
    (folder / "8.png").unlink()  # a picture less is no error, a folder less is
    look_at([folder / "3.png"], tmp_path / "out", checkpoint, like=like, neighbours=20)
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="which is not there"):
        look_at([tmp_path / "moved/3.png"], tmp_path / "out", checkpoint, like=like)


def test_a_convnet_has_neighbours_but_no_attention(tmp_path: Path, photos: list[Path]) -> None:
    arch = {"family": "torchvision", "name": "resnet18", "embed_dim": 512}
    convnet = write_checkpoint(tmp_path / "convnet.safetensors", arch=arch)
    with pytest.raises(ValueError, match="torchvision's resnet18: attention and patches are shown of this project's"):
        look_at(photos, tmp_path / "out", convnet)
    assert not (tmp_path / "out").exists()
    embed_folder(photos[0].parent, tmp_path / "f.parquet", convnet, device=CPU)
    look_at(photos[:1], tmp_path / "out", convnet, like=tmp_path / "f.parquet", neighbours=2)
    assert set(contents(tmp_path / "out")) == {
        "sheet.png",
        "wide/image.png",
        "wide/nearest-1.png",
        "wide/nearest-2.png",
    }


def test_what_is_no_image_is_named(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png: not an image"):
        look_at([tmp_path / "notes.png"], tmp_path / "out", checkpoint)


def test_folders_of_equal_names_are_numbered() -> None:
    assert distinct(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]
