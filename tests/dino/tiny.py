"""A training small enough for a test, with everything on: digit-like colour images, drop-path, every augmentation."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.images import ImageTable, write_image_table

IMAGES, EPOCHS, BATCH = 30, 2, 4  # 7 steps an epoch, two images left over
STEPS_PER_EPOCH = IMAGES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH

SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch": BATCH,
    "arch": "vit_tiny",
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "drop_path_rate": 0.3,
    "out_dim": 32,
    "hidden_dim": 24,
    "bottleneck_dim": 16,
    "global_px": 12,
    "local_px": 8,
    "local_crops": 2,
    "blur_p": (1.0, 0.5, 0.5),
    "solarize_p": (0.0, 0.5, 0.0),
    "lr_at_256": 0.05,
    "warmup_epochs": 0.5,
    "freeze_last_layer_epochs": 0.5,
    "teacher_temp_warmup_epochs": 2,
    "teacher_temp": 0.07,
    "precision": "fp32",
}


def digits(count: int, height: int = 14, width: int = 14) -> list[bytes]:
    """PNG files of a thick coloured stroke or ring each, by turns."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    files = []
    for number in range(count):
        top, left = rng.uniform(0.3, 0.7, 2) * (height, width)
        slope, radius = rng.uniform(-1, 1), rng.uniform(2.5, 4.5)
        distance = np.hypot(rows - top, columns - left)
        ring, stroke = np.abs(distance - radius), np.abs((columns - left) - slope * (rows - top))
        ink = np.clip(1.5 - (ring if number % 2 else stroke), 0, 1)[..., None] * rng.uniform(0.4, 1, 3)
        pixels = np.uint8(255 * np.clip(ink + 0.03 * rng.random((height, width, 3)), 0, 1))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


def write_table(path: Path, files: list[bytes] | None = None) -> ImageTable:
    """A table of these files, by default IMAGES of one size."""
    rows = sorted((hashlib.md5(data).hexdigest()[:16], data) for data in files or digits(IMAGES))
    write_image_table(path, rows, channels=3, mean=[0.2, 0.2, 0.2], std=[0.3, 0.3, 0.3])
    return ImageTable(path)
