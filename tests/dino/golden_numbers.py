"""The reference implementation's own numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


class Golden:
    """One file of tests/golden: inputs and outputs of facebookresearch/dino at 7c446df."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = dict(file)

    def __getitem__(self, key: str) -> Tensor:
        return torch.tensor(self.arrays[key])

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["config"]))

    def names(self, key: str) -> list[str]:
        return self.arrays[key].tolist()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose name begins so, without that beginning: `w/` gives a state dict."""
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}
