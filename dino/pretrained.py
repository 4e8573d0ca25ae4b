"""A trained backbone ready for use: images of any kind -> its evaluation transform -> features.

Legend: N images, C channels, P pixels of the crop's side, D features.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dino.augment import eval_images, normalize
from dino.checkpoint import evaluation_size, load_backbone
from dino.decode import image_pixels, open_image, standard_image
from dino.images import ImageBatch

if TYPE_CHECKING:
    from PIL import Image

    Picture = Image.Image | np.ndarray | Tensor | str | Path | bytes  # one image, in any of these forms

BATCH = 64  # images that pass the backbone together


@dataclass(frozen=True)
class Transform:
    """The evaluation transform of the pipeline: upright, 8 bits, short side to resize_px, centre crop, normalised.

    Attributes:
        resize_px: Short side before the crop.
        crop_px: Side of the crop.
        channels: 1 (grey) or 3 (RGB); images are converted.
        mean, std: Per channel, of pixels in 0..1.
    """

    resize_px: int
    crop_px: int
    channels: int
    mean: list[float]
    std: list[float]

    def __call__(self, images: Picture | Iterable[Picture]) -> Tensor:
        """Float32 [C, P, P] of one image, [N, C, P, P] of several (each on its own: no image changes another's).

        Args:
            images: One, or a list (an array [N, H, W, C], a tensor [N, C, H, W]) of: PIL image of any mode, path,
                encoded bytes, uint8 array [H, W] or [H, W, C], uint8 tensor [H, W] or [C, H, W]; 1, 3 or 4 (with
                alpha) channels, any size. 16-bit grey arrays are scaled over their full range, as files are.

        Raises:
            ValueError: What is no image, with its path if it has one.
            OSError: A path that cannot be read.
        """
        crops = self.crops(images)
        return normalize(crops, self.mean, self.std)

    def crops(self, images: Picture | Iterable[Picture]) -> Tensor:
        """As calling it, but not normalised: pixels of 0..1, which exported ONNX files expect."""
        if not _is_several(images):
            return self._crop(images)  # type: ignore[arg-type]  # told apart at run time
        found = [self._crop(image) for image in images]  # type: ignore[union-attr, arg-type]
        return torch.stack(found) if found else torch.zeros(0, self.channels, self.crop_px, self.crop_px)

    def _crop(self, image: Picture) -> Tensor:
        pixels_CHW = torch.from_numpy(np.array(image_pixels(read_image(image), self.channels)))
        batch = ImageBatch(pixels_CHW[None], torch.tensor([pixels_CHW.shape[1:]]))
        neutral = {"mean": [0.0] * self.channels, "std": [1.0] * self.channels}
        return eval_images(batch, resize_px=self.resize_px, crop_px=self.crop_px, **neutral)[0]


def _is_several(images: object) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 4
    return isinstance(images, Iterable) and not isinstance(images, str | bytes | bytearray)  # PIL images are none


def read_image(image: Picture) -> Image.Image:
    """Any form of an image as one of mode "L" or "RGB"."""
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        try:
            return open_image(Path(image).read_bytes())
        except ValueError as problem:
            raise ValueError(f"{image}: {problem}") from problem
    if isinstance(image, bytes | bytearray):
        return open_image(bytes(image))
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().numpy()
        return standard_image(_from_array(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0), "[C, H, W]"))
    if isinstance(image, np.ndarray):
        return standard_image(_from_array(image, "[H, W, C]"))
    if isinstance(image, Image.Image):
        return standard_image(image)
    raise ValueError(f"no image: {type(image).__name__}; give a PIL image, a path, encoded bytes or a uint8 array")


def _from_array(pixels: np.ndarray, form: str) -> Image.Image:
    """A uint8 array [H, W] or [H, W, C], or uint16 [H, W], as an image."""
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    deep_grey = pixels.dtype == np.uint16 and pixels.ndim == 2
    if not deep_grey and pixels.dtype != np.uint8:
        raise ValueError(f"an array of {pixels.dtype}; give uint8 of 0..255, e.g. (image * 255).round() as uint8")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or not pixels.size:
        raise ValueError(f"an array of shape {list(pixels.shape)}, channels last; give {form} with 1, 3 or 4 channels")
    return Image.fromarray(np.ascontiguousarray(pixels))


@dataclass(frozen=True)
class Pretrained:
    """A trained backbone and what belongs to it.

    Attributes:
        backbone: In eval mode; its weights are frozen (`requires_grad_()` to fine-tune).
        transform: Images -> its input.
        facts: What the checkpoint says: arch, channels, mean, std, params, data_md5, key ...
    """

    backbone: nn.Module
    transform: Transform
    facts: dict[str, Any]

    def __call__(self, images: Picture | Iterable[Picture], *, batch: int = BATCH) -> Tensor:
        """Features on the CPU, float32: [D] of one image, [N, D] of several; `images` as for the transform."""
        if not _is_several(images):
            return self.features(self.transform(images)[None])[0]
        several: Sequence[Picture] = list(images)  # type: ignore[arg-type]
        starts = range(0, max(len(several), 1), batch)
        return torch.cat([self.features(self.transform(several[first : first + batch])) for first in starts])

    def features(self, images_NCPP: Tensor) -> Tensor:
        """Features float32 [N, D] on the CPU of transformed images."""
        device = next(self.backbone.parameters()).device
        with torch.inference_mode():
            features_ND: Tensor = self.backbone(images_NCPP.to(device)).float().cpu()
        return features_ND.clone()  # outside: a tensor of inference mode could not be trained on

    def __repr__(self) -> str:
        t = self.transform
        kind = "grey" if t.channels == 1 else "RGB"
        arch = ", ".join(f"{name}={value}" for name, value in self.facts["arch"].items())
        size = f"short side {t.resize_px} px, centre crop {t.crop_px} px"
        return f"Pretrained({type(self.backbone).__name__}({arch}); {kind} images, {size}; key {self.facts['key']})"


def load_pretrained(path: str | Path, *, device: str = "cpu") -> Pretrained:
    """See `dino.load`."""
    backbone, facts = load_backbone(path)
    try:
        resize_px, crop_px = evaluation_size(facts)
        transform = Transform(resize_px, crop_px, facts["channels"], facts["mean"], facts["std"])
        facts["key"]
    except (KeyError, TypeError) as problem:
        raise ValueError(f"{path} lacks facts of its images ({problem}); train it anew with this project") from problem
    return Pretrained(backbone.requires_grad_(False).to(device), transform, facts)
