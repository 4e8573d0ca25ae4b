"""What a pretraining of the current settings and images would be: its resolved settings, and the KEY that names it."""

from dataclasses import asdict

import torch

from dino.config import PretrainConfig
from dino.fingerprint import intent_key
from dino.images import ImageTable
from dino.precision import resolve_precision
from dino.weights import digest


def resolve(settings: PretrainConfig, table: ImageTable, device: torch.device) -> tuple[PretrainConfig, str]:
    """The settings with what this device chooses filled in, and the KEY of settings, files and code.

    Initial weights count by their content, not by their name.
    """
    config = PretrainConfig(**asdict(settings) | {"precision": resolve_precision(settings.precision, device)})
    return config, intent_key(asdict(config) | {"initial_weights": digest(config.initial_weights)}, table.digest())
