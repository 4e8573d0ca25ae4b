"""What a pretraining of the current settings and images would be: its resolved settings, and the KEY that names it."""

from dataclasses import asdict

import torch

from dino.config import PretrainConfig
from dino.distributed import World
from dino.fingerprint import intent_key
from dino.images import ImageTable
from dino.precision import resolve_precision
from dino.weights import digest
from pipelines import paths


def resolve(settings: PretrainConfig, table: ImageTable, device: torch.device) -> tuple[PretrainConfig, str]:
    """The settings with what this device chooses filled in, and the KEY of settings, files and code.

    Initial weights count by their content, not by their name.
    """
    config = PretrainConfig(**asdict(settings) | {"precision": resolve_precision(settings.precision, device)})
    return config, intent_key(asdict(config) | {"initial_weights": digest(config.initial_weights)}, table.digest())


def key_here(settings: PretrainConfig) -> str:
    """The KEY that these settings and the prepared images of the working directory have on this machine.

    Raises:
        ValueError: There are no prepared images.
    """
    return resolve(settings, ImageTable(paths.TRAIN_IMAGES), World.detect().device)[1]
