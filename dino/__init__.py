"""DINO: self-distillation with no labels (Caron et al. 2021), in plain PyTorch; `dino.load` gives a trained one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dino.pretrained import Pretrained


def load(path: str | Path, *, device: str = "cpu") -> Pretrained:
    """A trained backbone, ready for use: `model = dino.load("models/teacher.safetensors"); model(images)`.

    Args:
        path: A backbone's checkpoint that this project wrote.
        device: Where the backbone computes, e.g. "cuda".

    Returns:
        `.backbone` in eval mode, `.transform` (images -> its input), `.facts`; called with images it gives features.

    Raises:
        ValueError: No such file, or no whole checkpoint of a backbone.
    """
    from dino.pretrained import load_pretrained  # here: `import dino` alone stays light

    return load_pretrained(path, device=device)
