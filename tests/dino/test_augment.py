"""The seeded augmentation against torchvision, against the paper's chain on PIL images, and row by row.

Differences are in 255ths: 1 is a step of an 8-bit pixel.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino import augment
from dino.augment import CropDraws, apply_draws, draw_view, eval_images, multi_crop
from dino.config import PretrainConfig
from dino.images import ImageBatch, pad
from dino.resample import BICUBIC, BILINEAR, Filter

CLOSE = 0.5  # against float arithmetic
MEAN, STD = [0.45, 0.4, 0.35], [0.2, 0.25, 0.3]
SMALL = {"patch_size": 8, "global_px": 48, "local_px": 24, "local_crops": 3, "blur_radius": (0.1, 2.0)}


def natural(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 [C, H, W] with the spectrum of photographs (amplitude 1 / frequency), channels that mostly agree."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(channels + 1, height, width))
    fields_ = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
    fields_ /= fields_.std(axis=(1, 2), keepdims=True)
    image = fields_[0] + 0.5 * fields_[1:]
    return np.clip(image * 55 + rng.uniform(90, 160, (channels, 1, 1)), 0, 255).astype(np.uint8)


def natural_batch(count: int, channels: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Of many sizes."""
    rng = np.random.default_rng(seed)
    return [natural(rng, int(h), int(w), channels) for h, w in rng.integers(40, 130, (count, 2))]


def drawn(batch: ImageBatch, view: int, step: int = 0, **settings) -> CropDraws:
    config = PretrainConfig(**{**SMALL, **settings})
    return draw_view(config, view, step, torch.arange(len(batch.sizes_B2)), batch.sizes_B2)


def steps_of_255(a: Tensor, b: Tensor) -> float:
    return 255 * (a - b).abs().max().item()


# --- each operation against torchvision's, in float, image by image ---


@pytest.mark.parametrize("cut", [augment.cut_by_products, augment.cut_each])  # of GPUs, of CPUs
@pytest.mark.parametrize(("view", "px"), [(0, 48), (2, 24), (0, 160)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel", [BICUBIC, BILINEAR], ids=lambda kernel: kernel.mode)
def test_boxes_are_cut_resized_and_flipped_as_by_torchvision(
    cut, view: int, px: int, channels: int, kernel: Filter
) -> None:
    images = natural_batch(24, channels)
    batch = pad(images)
    d = drawn(batch, view)
    assert d.flip.any() and not d.flip.all()
    for i, crop in enumerate(cut(batch.pixels_BCHW, d, px, kernel)):
        box = [int(x[i]) for x in (d.top, d.left, d.height, d.width)]
        image = torch.from_numpy(images[i]).float() / 255
        mode = InterpolationMode(kernel.mode)
        expected = tv.resized_crop(image, *box, [px, px], mode, antialias=True).clamp(0, 1)
        expected = tv.horizontal_flip(expected) if d.flip[i] else expected
        assert steps_of_255(crop, expected) <= CLOSE


OPERATIONS = {
    "brightness": (augment.adjust_brightness, tv.adjust_brightness, (0.6, 1.4)),
    "contrast": (augment.adjust_contrast, tv.adjust_contrast, (0.6, 1.4)),
    "saturation": (augment.adjust_saturation, tv.adjust_saturation, (0.8, 1.2)),
    "hue": (augment.adjust_hue, tv.adjust_hue, (-0.5, 0.5)),
}


def float_images(count: int, px: int = 24, channels: int = 3) -> Tensor:
    """Natural-like ones, noise, and pixels where hue is a matter of definition: grey, black, white, ties."""
    rng = np.random.default_rng(1)
    images = [natural(rng, px, px, channels) for _ in range(count - 2)]
    images.append(rng.integers(0, 256, (channels, px, px), dtype=np.uint8))
    images.append(rng.choice(np.array([0, 127, 128, 255], dtype=np.uint8), (channels, px, px)))
    return torch.from_numpy(np.stack(images)).float() / 255


@pytest.mark.parametrize(
    ("name", "channels"), [*((name, 3) for name in OPERATIONS), ("brightness", 1), ("contrast", 1)]
)
def test_an_adjustment_is_torchvisions(name: str, channels: int) -> None:
    ours, theirs, (low, high) = OPERATIONS[name]
    images = float_images(12, channels=channels)
    factors = torch.linspace(low, high, 12)
    adjusted = ours(images, factors[:, None, None, None])
    for i, image in enumerate(images):
        assert steps_of_255(adjusted[i], theirs(image, factors[i].item())) <= CLOSE, i


@pytest.mark.parametrize("channels", [1, 3])
def test_the_jitter_runs_torchvisions_adjustments_in_each_samples_order(channels: int) -> None:
    images = float_images(48, channels=channels)
    batch = ImageBatch(images, torch.full((48, 2), 24))
    d = drawn(batch, 0)
    assert len({tuple(order) for order in d.order.tolist()}) > 12 and not d.jitter.all()
    jittered = augment.color_jitter(images, d)
    for i, image in enumerate(images):
        expected = image
        for operation in d.order[i].tolist() if d.jitter[i] else []:
            name = augment.JITTER_OPERATIONS[operation]
            expected = OPERATIONS[name][1](expected, d.factors[i, operation].item())
        assert steps_of_255(jittered[i], expected) <= CLOSE, i


def test_grayscale_is_torchvisions() -> None:
    images = float_images(4)
    expected = tv.rgb_to_grayscale(images, num_output_channels=1)
    assert steps_of_255(augment.gray_of(images), expected) <= CLOSE


def test_solarize_is_torchvisions() -> None:
    images = float_images(6)
    expected = tv.solarize(images, threshold=128 / 255)
    torch.testing.assert_close(augment.solarize(images), expected, rtol=0, atol=0)
    # and PIL's, exactly, at every 8-bit value
    ramp = np.arange(256, dtype=np.uint8)[None]
    pil = np.asarray(ImageOps.solarize(Image.fromarray(ramp), 128))
    found = augment.solarize(torch.from_numpy(ramp).float() / 255) * 255
    np.testing.assert_allclose(found.numpy(), pil, atol=1e-4)


def slow_blur(image: np.ndarray, radius: float) -> np.ndarray:
    """The Gaussian summed far beyond its reach, one output pixel at a time, edges repeated; float64 [C, P, P]."""
    px, far = image.shape[-1], 40
    offsets = np.arange(-far, far + 1)
    kernel = np.exp(-0.5 * (offsets / radius) ** 2)
    kernel /= kernel.sum()
    out = np.zeros_like(image)
    for y in range(px):
        for x in range(px):
            ys, xs = np.clip(y + offsets, 0, px - 1), np.clip(x + offsets, 0, px - 1)
            out[:, y, x] = kernel @ image[:, ys][:, :, xs] @ kernel
    return out


def test_blur_is_the_slow_exact_one() -> None:
    images = float_images(8, px=14)
    radius = torch.tensor([0.1, 0.26, 0.5, 0.8, 1.2, 1.99, 2.0, 5.0], dtype=torch.float64)
    blurred = augment.gaussian_blur(images, radius)
    for i, image in enumerate(images):
        expected = torch.from_numpy(slow_blur(image.double().numpy(), radius[i].item()))
        assert steps_of_255(blurred[i], expected) <= CLOSE / 5, radius[i]


@pytest.mark.parametrize("px", [1, 2, 7, 20])
def test_blur_weights_sum_to_one_and_know_only_their_own_radius(px: int) -> None:
    radius = torch.linspace(0.1, 6.0, 40, dtype=torch.float64)
    weights = augment.blur_weights(radius, px)
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, px, dtype=torch.float64), rtol=0, atol=1e-14)
    for i in range(40):
        alone = augment.blur_weights(radius[i : i + 1], px)
        torch.testing.assert_close(weights[i : i + 1], alone, rtol=0, atol=0)


def chain_by_torchvision(image: np.ndarray, d: CropDraws, i: int, px: int) -> Tensor:
    """What apply_draws does, one float image at a time by torchvision; the blur by the exact kernel."""
    box = [int(x[i]) for x in (d.top, d.left, d.height, d.width)]
    x = torch.from_numpy(image).float() / 255
    x = tv.resized_crop(x, *box, [px, px], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    x = tv.horizontal_flip(x) if d.flip[i] else x
    for operation in d.order[i].tolist() if d.jitter[i] else []:
        x = OPERATIONS[augment.JITTER_OPERATIONS[operation]][1](x, d.factors[i, operation].item())
    x = tv.rgb_to_grayscale(x, num_output_channels=len(x)) if d.grayscale[i] else x
    if d.blur[i]:
        x = torch.from_numpy(slow_blur(x.double().numpy(), d.radius[i].item())).float()
    return tv.solarize(x, threshold=128 / 255) if d.solarize[i] else x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("view", [0, 1, 2])
def test_the_whole_chain_is_torchvisions(view: int, channels: int) -> None:
    images = natural_batch(16, channels)
    batch = pad(images)
    d = drawn(batch, view, solarize_p=(0.0, 0.5, 0.0), blur_p=(1.0, 0.3, 0.5))
    for i, crop in enumerate(apply_draws(batch.pixels_BCHW, d, 16)):
        expected = chain_by_torchvision(images[i], d, i, 16)
        # solarize jumps by 1 / 255 at its threshold: a pixel that rounds to its other side differs by that
        assert steps_of_255(crop, expected) <= (1.5 if d.solarize[i] else CLOSE), i


# --- the paper's chain on PIL images ---


def pil_operations(pil: Image.Image, d: CropDraws, i: int, px: int):
    """The reference's DataAugmentationDINO with these draws: (name, image after it), 8 bits at every stage."""
    top, left, height, width = (int(x[i]) for x in (d.top, d.left, d.height, d.width))
    pil = pil.crop((left, top, left + width, top + height)).resize((px, px), Image.Resampling.BICUBIC)
    yield "resize", pil
    if d.flip[i]:
        yield "flip", (pil := pil.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for operation in d.order[i].tolist() if d.jitter[i] else []:
        name = augment.JITTER_OPERATIONS[operation]
        yield name, (pil := OPERATIONS[name][1](pil, d.factors[i, operation].item()))
    if d.grayscale[i]:
        yield "grayscale", (pil := pil.convert("L").convert("RGB"))
    if d.blur[i]:
        yield "blur", (pil := pil.filter(ImageFilter.GaussianBlur(radius=d.radius[i].item())))
    if d.solarize[i]:
        yield "solarize", (pil := ImageOps.solarize(pil, 128))


def only(d: CropDraws, name: str, i: int) -> CropDraws:
    """Row i of the draws with one operation switched on, on a crop that is the whole image."""
    row = {f.name: getattr(d, f.name)[i : i + 1] for f in fields(CropDraws)}
    off = torch.tensor([False])
    row |= dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), off)
    row[{"brightness": "jitter", "contrast": "jitter", "saturation": "jitter", "hue": "jitter"}.get(name, name)] = ~off
    return CropDraws(**row)


def ours_alone(pil: Image.Image, name: str, d: CropDraws, i: int, px: int) -> Tensor:
    """One of our operations on the 8-bit image that PIL's had before it."""
    pixels = torch.from_numpy(np.asarray(pil).transpose(2, 0, 1).copy())[None]
    row = only(d, name, i) if name != "resize" else None
    if row is None:
        one = CropDraws(**{f.name: getattr(d, f.name)[i : i + 1] for f in fields(CropDraws)})
        return augment.crop_boxes(pixels, replace(one, flip=torch.tensor([False])), px)
    image = pixels.float() / 255
    if name == "flip":
        return image.flip(-1)
    if name == "grayscale":
        return augment.gray_of(image).expand(-1, 3, -1, -1)
    if name == "blur":
        return augment.gaussian_blur(image, row.radius)
    if name == "solarize":
        return augment.solarize(image)
    operation = augment.JITTER_OPERATIONS.index(name)
    return augment.ADJUSTMENTS[operation](image, row.factors[:, operation].float()[:, None, None, None])


PIL_OPERATIONS = (
    "resize", "flip", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize",
)  # fmt: skip


def test_the_papers_chain_on_pil_images(capsys) -> None:
    px = 48
    images = natural_batch(48, seed=3)
    batch = pad(images)
    by_operation: dict[str, list[np.ndarray]] = {name: [] for name in PIL_OPERATIONS}
    whole = []
    for view in (0, 1, 2):
        d = drawn(batch, view, solarize_p=(0.0, 0.2, 0.0))
        crops = apply_draws(batch.pixels_BCHW, d, px)
        for i, crop in enumerate(crops):
            pil = Image.fromarray(images[i].transpose(1, 2, 0))
            for name, after in pil_operations(pil, d, i, px):
                ours = ours_alone(pil, name, d, i, px)[0] * 255
                by_operation[name].append(np.abs(ours.numpy() - np.asarray(after).transpose(2, 0, 1)).ravel())
                pil = after
            whole.append(np.abs(crop.numpy() * 255 - np.asarray(pil).transpose(2, 0, 1)).ravel())
    lines = []
    for name, parts in {**by_operation, "whole chain": whole}.items():
        differences = np.concatenate(parts)
        mean, high = differences.mean(), np.quantile(differences, 0.999)
        lines.append(f"{name} {mean:.2f}/{high:.1f}")
        assert mean <= 2, lines[-1]
    with capsys.disabled():
        print("\nagainst PIL, 255ths, mean/p99.9:", ", ".join(lines))


# --- what is drawn ---


def test_a_samples_crops_depend_on_its_row_alone() -> None:
    images = natural_batch(12)
    config = PretrainConfig(**SMALL)
    rows = 100 + torch.arange(12)
    settings = {"config": config, "step": 7, "mean": MEAN, "std": STD}
    whole = multi_crop(pad(images), rows=rows, **settings)
    assert [tuple(crop.shape) for crop in whole] == [(12, 3, 48, 48)] * 2 + [(12, 3, 24, 24)] * 3
    # alone, some, in another order, and as ranks and micro-batches split them; padding is never seen
    parts = [[0], [5], [11], [9, 2, 4], list(range(6)), list(range(6, 12))]
    for part in parts:
        crops = multi_crop(pad([images[i] for i in part]), rows=rows[part], **settings)
        for crop, all_crops in zip(crops, whole, strict=True):
            torch.testing.assert_close(crop, all_crops[part], rtol=0, atol=1e-6)


def test_each_sample_draws_its_own_and_anew_each_step_and_view() -> None:
    image = natural(np.random.default_rng(0), 64, 64)
    batch = pad([image] * 8)
    config = PretrainConfig(**SMALL)
    settings = {"config": config, "mean": MEAN, "std": STD}
    rows = torch.arange(8)
    crops = [multi_crop(batch, step=step, rows=rows, **settings) for step in (0, 1)]
    again = multi_crop(batch, step=0, rows=rows, **settings)
    other = multi_crop(batch, step=0, rows=rows, **{**settings, "config": replace(config, seed=1)})
    for a, b in zip(crops[0], again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for views in (slice(0, 2), slice(2, 5)):
        everything = torch.cat([*crops[0][views], *crops[1][views], *other[views]]).flatten(1)
        distances = torch.cdist(everything, everything) + 1e3 * torch.eye(len(everything))
        assert distances.min() > 1


def test_crops_are_normalised_last() -> None:
    batch = pad([np.full((3, 40, 40), value, dtype=np.uint8) for value in (0, 51, 255)])
    config = PretrainConfig(**SMALL, jitter_p=0.0, grayscale_p=0.0, solarize_p=(0.0, 0.0, 0.0))
    crops = multi_crop(batch, config=config, step=0, rows=torch.arange(3), mean=MEAN, std=STD)
    for crop in crops:
        for image, value in zip(crop, (0.0, 0.2, 1.0), strict=True):
            expected = (torch.tensor([value]) - torch.tensor(MEAN)) / torch.tensor(STD)
            torch.testing.assert_close(image.mean((1, 2)), expected, rtol=0, atol=1e-5)
            assert image.std((1, 2)).max() < 1e-5


def test_without_locals_there_are_two_globals() -> None:
    config = PretrainConfig(**{**SMALL, "local_crops": 0}, global_scale=(0.14, 1.0))
    crops = multi_crop(pad(natural_batch(2)), config=config, step=0, rows=torch.arange(2), mean=MEAN, std=STD)
    assert [crop.shape[-1] for crop in crops] == [48, 48]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_makes_the_same_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same draws to the bit: they are made on the CPU, and only pixels travel."""
    batch = pad(natural_batch(16))
    settings = {
        "config": PretrainConfig(**SMALL),
        "step": 3,
        "rows": torch.arange(16),
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    used: list[CropDraws] = []

    def noted(*arguments: Any) -> CropDraws:
        used.append(draw_view(*arguments))
        return used[-1]

    monkeypatch.setattr(augment, "draw_view", noted)
    on_cuda = multi_crop(ImageBatch(batch.pixels_BCHW.cuda(), batch.sizes_B2), **settings)
    on_cpu = multi_crop(batch, **settings)
    assert used and len(used) % 2 == 0
    for there, here in zip(used[: len(used) // 2], used[len(used) // 2 :], strict=True):
        for field in fields(CropDraws):
            assert getattr(there, field.name).device.type == "cpu"
            assert torch.equal(getattr(there, field.name), getattr(here, field.name)), field.name
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert b.device.type == "cuda" and steps_of_255(a, b.cpu()) <= CLOSE


# --- evaluation images ---


@pytest.mark.parametrize(("resize_px", "crop_px"), [(256, 224), (40, 32), (32, 32), (33, 20), (28, 27)])
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_images_are_torchvisions(resize_px: int, crop_px: int, channels: int) -> None:
    rng = np.random.default_rng(5)
    sizes = [(28, 28), (50, 31), (31, 50), (97, 40), (64, 65), (33, 120)]
    images = [natural(rng, h, w, channels) for h, w in sizes]
    mean, std = MEAN[:channels], STD[:channels]
    found = eval_images(pad(images), resize_px=resize_px, crop_px=crop_px, mean=mean, std=std)
    assert found.dtype == torch.float32 and found.shape == (6, channels, crop_px, crop_px)
    for i, image in enumerate(images):
        x = torch.from_numpy(image).float() / 255
        x = tv.resize(x, [resize_px], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = tv.normalize(tv.center_crop(x, [crop_px, crop_px]), mean, std)
        assert 255 * ((found[i] - x).abs() * torch.tensor(std)[:, None, None]).max() <= CLOSE, sizes[i]
        alone = eval_images(pad([image]), resize_px=resize_px, crop_px=crop_px, mean=mean, std=std)
        torch.testing.assert_close(alone[0], found[i], rtol=0, atol=1e-5)


def test_evaluation_images_as_they_are_are_left_alone() -> None:
    images = natural_batch(3)
    images = [image[:, :36, :36] for image in images]
    found = eval_images(pad(images), resize_px=36, crop_px=36, mean=[0.0] * 3, std=[1.0] * 3)
    assert steps_of_255(found, torch.from_numpy(np.stack(images)).float() / 255) < 1e-3


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_px \(40\) is larger than resize_px \(32\)"):
        eval_images(pad(natural_batch(1)), resize_px=32, crop_px=40, mean=MEAN, std=STD)
