"""`dino.load`: one line to the pipeline's own features, for images in any form; what is none is refused in words."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import digits, write_table

import dino
from dino.backbones import seeded_backbone
from dino.checkpoint import BACKBONE_FORMAT, evaluation_size, save_tensors
from dino.distributed import World
from dino.features import extract_features
from dino.pretrained import Pretrained

ARCH = {"family": "vit", "img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def write_checkpoint(
    path: Path, *, channels: int = 3, without: str = "", arch: dict[str, Any] = ARCH, **changed: Any
) -> Path:
    """A network of seed 5 and the facts that the pipeline writes."""
    arch = arch | {"in_chans": channels}
    facts = {
        "format": BACKBONE_FORMAT,
        "arch": arch,
        "seed": 5,
        "channels": channels,
        "mean": [0.2, 0.25, 0.3][:channels],
        "std": [0.3, 0.2, 0.25][:channels],
        "params": {"global_px": 12},
        "evaluation": {"resize_px": 14, "crop_px": 12},
        "key": "0123456789abcdef",
    }
    facts = {name: value for name, value in (facts | changed).items() if name != without}
    save_tensors(path, seeded_backbone(arch, 5).state_dict(), facts)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return dino.load(write_checkpoint(tmp_path_factory.mktemp("model") / "teacher.safetensors"))


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def pixels(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_features_are_those_of_the_pipeline(model: Pretrained, tmp_path: Path) -> None:
    """By the code of stage embed, on a prepared table of images of many sizes."""
    sizes = [(14, 14), (14, 40), (33, 15), (9, 11), (3, 50), (12, 12)]
    table = write_table(tmp_path / "images.arrow", [data for size in sizes for data in digits(3, *size)])
    table.mean, table.std = model.transform.mean, model.transform.std
    view = {"resize_px": model.transform.resize_px, "crop_px": model.transform.crop_px}
    expected = extract_features(model.backbone, table, **view, batch=5, world=World(0, 1, torch.device("cpu")))
    found = model([table.encoded(row) for row in range(len(table))], batch=4)
    assert found.shape == (18, 16) and found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert (found - found[0]).abs()[1:].amax(1).min() > 1e-3, "images with different features"


def test_every_form_of_an_image_is_the_same_image(model: Pretrained, tmp_path: Path) -> None:
    values = pixels()
    file = tmp_path / "image.png"
    file.write_bytes(encoded(values))
    chw = torch.from_numpy(values).permute(2, 0, 1)
    opaque = np.concatenate([values, np.full((20, 30, 1), 255, np.uint8)], axis=2)
    with Image.open(file) as lazy:
        forms = [file, str(file), file.read_bytes(), lazy, Image.fromarray(values), values, chw, opaque]
        together = model.transform(forms)
        assert together.shape == (len(forms), 3, 12, 12)
        assert all(torch.equal(one, together[0]) for one in together)
        assert torch.equal(model.transform(lazy), together[0])
    assert torch.equal(model.transform(np.stack([values, values])), together[:2])
    assert torch.equal(model.transform(torch.stack([chw, chw])), together[:2])
    assert torch.equal(model.transform(one for one in (file, values)), together[:2])
    assert torch.allclose(model(file), model([values, values])[0], rtol=0, atol=1e-5)


def test_an_image_does_not_know_its_neighbours(model: Pretrained) -> None:
    images = [pixels(9, 40), pixels(50, 17), pixels(12, 12)]
    together = model.transform(images)
    for image, crop in zip(images, together, strict=True):
        assert torch.equal(model.transform(image), crop)
        assert torch.equal(model.transform(list(reversed([image]))), crop[None])


def test_no_images_are_no_features(model: Pretrained) -> None:
    assert model.transform([]).shape == (0, 3, 12, 12)
    assert model([]).shape == (0, 16)


def test_crops_are_pixels_and_the_transform_normalises_them(model: Pretrained) -> None:
    flat = np.full((20, 30, 3), 51, np.uint8)
    assert torch.allclose(model.transform.crops(flat), torch.full((3, 12, 12), 0.2), atol=1e-6)
    expected = (0.2 - torch.tensor([0.2, 0.25, 0.3])) / torch.tensor([0.3, 0.2, 0.25])
    assert torch.allclose(model.transform(flat), expected[:, None, None].expand(-1, 12, 12), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_and_depth(channels: int, tmp_path: Path) -> None:
    """Grey for colour networks and the reverse, 16 bits, CMYK, alpha, palettes, one pixel."""
    transform = dino.load(write_checkpoint(tmp_path / "t.safetensors", channels=channels)).transform
    grey = np.uint8(np.add.outer(np.arange(20), 3 * np.arange(30)))
    as_grey = transform(grey)
    assert as_grey.shape == (channels, 12, 12)
    assert torch.equal(transform(np.stack([grey] * 3, axis=2)), as_grey)
    assert torch.equal(transform(grey[..., None]), as_grey)
    assert torch.equal(transform(torch.from_numpy(grey)), as_grey)
    assert torch.equal(transform(torch.from_numpy(grey)[None]), as_grey)
    assert torch.equal(transform(grey.astype(np.uint16) * 257), as_grey)
    assert torch.equal(transform(encoded(grey.astype(np.uint16) * 257)), as_grey)
    assert torch.equal(transform(Image.fromarray(grey).convert("P")), as_grey)
    cmyk = Image.fromarray(pixels()).convert("CMYK")
    assert torch.allclose(transform(encoded(cmyk, "TIFF")), transform(Image.fromarray(pixels())), atol=0.1)
    clear = np.zeros((20, 30, 4), np.uint8)
    assert torch.equal(transform(clear), transform(np.full((20, 30, 3), 255, np.uint8)))
    assert transform(np.zeros((1, 1), np.uint8)).isfinite().all()
    assert transform(np.zeros((1, 300), np.uint8)).isfinite().all()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_photo_is_upright_in_every_form(model: Pretrained, orientation: int, tmp_path: Path) -> None:
    upright = np.uint8(np.add.outer(4 * np.arange(20), 3 * np.arange(30)))
    stored = {3: upright[::-1, ::-1], 6: upright.T[::-1], 8: upright.T[:, ::-1]}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(np.ascontiguousarray(stored), exif=exif))
    with Image.open(file) as opened:
        assert torch.equal(model.transform([file, opened]), model.transform([upright, upright]))


def test_what_is_no_image_is_refused_with_its_name(model: Pretrained, tmp_path: Path) -> None:
    text, cut = tmp_path / "notes.jpg", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(encoded(pixels())[:300])
    for file, words in ((text, "not an image"), (cut, "not readable")):
        with pytest.raises(ValueError, match=f"{file.name}: {words}"):
            model.transform([pixels(), file])
    with pytest.raises(FileNotFoundError, match="absent"):
        model.transform(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32; give uint8"),
        (torch.zeros(3, 4, 4), "float32; give uint8"),
        (np.zeros((4, 4, 3), np.uint16), "uint16; give uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\].*give \[H, W, C\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"give \[C, H, W\]"),
        (np.zeros((0, 4), np.uint8), r"\[0, 4\]"),
        (np.zeros(4, np.uint8), r"\[4\]"),
        ([None], "NoneType"),
        (7, "int"),
    ],
)
def test_arrays_of_another_kind_are_refused_with_the_cure(model: Pretrained, image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.transform(image)


def test_the_backbone_rests_and_its_features_may_be_trained_on(model: Pretrained) -> None:
    assert not model.backbone.training
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    probe = torch.nn.Linear(16, 2)
    probe(model([pixels()])).sum().backward()
    assert probe.weight.grad is not None
    assert "short side 14 px" in repr(model) and "0123456789abcdef" in repr(model)


def test_the_size_is_the_checkpoints_or_the_papers_share_of_the_training_crop() -> None:
    assert evaluation_size({"evaluation": {"resize_px": 40, "crop_px": 32}, "params": {"global_px": 64}}) == (40, 32)
    assert evaluation_size({"params": {"global_px": 224}}) == (256, 224)
    assert evaluation_size({"params": {"global_px": 28}}) == (32, 28)


@pytest.mark.parametrize("missing", ["mean", "std", "channels", "key"])
def test_a_checkpoint_without_facts_of_its_images_is_refused(tmp_path: Path, missing: str) -> None:
    file = write_checkpoint(tmp_path / "t.safetensors", without=missing)
    with pytest.raises(ValueError, match=f"lacks facts of its images.*{missing}"):
        dino.load(file)


class Boobytrap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trapped"),)


def test_foreign_truncated_and_hostile_checkpoints_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = write_checkpoint(tmp_path / "good.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    bad = {
        "cut.safetensors": good[:-100],
        "flipped.safetensors": bytes(flipped),
        "empty.safetensors": b"",
        "official.pth": pickle.dumps({"teacher": Boobytrap()}),
        "picture.safetensors": encoded(pixels()),
    }
    for name, data in bad.items():
        Path(name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            dino.load(name)
    with pytest.raises(ValueError, match="no checkpoint at absent"):
        dino.load("absent")
    assert not Path("trapped").exists()
