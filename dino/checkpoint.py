"""Checkpoints: safetensors with one JSON entry of facts; whole or not at all, verified when read, no code in them."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dino.backbones import seeded_backbone
from dino.files import whole_file

RESIZE_OVER_CROP = 256 / 224  # of evaluation images (the paper's)
BACKBONE_FORMAT = "dino-backbone-1"
STATE_FORMAT = "dino-training-state-1"
RESTORE = "restore it (`dvc checkout`), or run the stage that writes it"
FACTS = "dino"  # the one metadata entry: safetensors writes several in no fixed order, and bytes must repeat


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> int:
    """CRC-32 of everything: facts, names, types, shapes, bytes."""
    value = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name}\0{tensor.dtype}{list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return value


def save_tensors(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts; the same content gives the same bytes, and the file appears whole or not at all."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**facts, "crc32": _checksum(content, facts)}, sort_keys=True, allow_nan=False)
    with whole_file(path, sum(tensor.nbytes for tensor in content.values()) + len(text)) as aside:
        save_file(content, aside, metadata={FACTS: text})


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and facts.

    Raises:
        ValueError: No such file, not one of ours, cut short or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; run the stage that writes it, or `dvc checkout {path}`")
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(json.loads((file.metadata() or {})[FACTS]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            known = facts.pop("crc32")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint of this project, or it is cut short ({error!r}); {RESTORE}"
        ) from error
    if known != _checksum(tensors, facts):
        raise ValueError(f"{path} was altered or damaged: its checksum does not match; {RESTORE}")
    return tensors, facts


def load_backbone(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in eval mode and its facts: arch (see `dino.backbones`), seed, channels, mean, std, params, ...

    Raises:
        ValueError: Not a backbone of this project, with the first keys that do not fit.
    """
    tensors, facts = load_tensors(path)
    if facts.get("format") != BACKBONE_FORMAT:
        raise ValueError(f"{path} is no backbone (format {facts.get('format')!r}); give models/teacher.safetensors")
    try:
        _refuse_absurd(facts["arch"], tensors)
        backbone = seeded_backbone(facts["arch"], seed=0)  # so that reading a file draws from no one's generator
        backbone.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: weights do not fit its own architecture {facts.get('arch')}: {error}; {RESTORE}"
        ) from error
    return backbone.eval(), facts


def _refuse_absurd(arch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse an architecture that needs more numbers than the file has, before memory is asked for it.

    Raises:
        ValueError: It does.
        TypeError, KeyError: It is no architecture at all.
    """
    numbers = sum(tensor.numel() for tensor in tensors.values())
    needs = [arch["in_chans"]]
    if arch["family"] == "vit":
        dim, patch = arch["embed_dim"], arch["patch_size"]
        needs += [arch["depth"] * dim**2, (arch["img_size"] // patch) ** 2 * dim, patch**2 * arch["in_chans"] * dim]
        needs += [arch.get("mlp_ratio", 1) * dim**2]
    if not all(0 < need <= numbers for need in needs):
        raise ValueError(f"it would need more numbers than the {numbers:,} of the file")


def evaluation_size(facts: dict[str, Any]) -> tuple[int, int]:
    """Short side and centre crop, in pixels, of the images that a backbone is judged and used on.

    What the checkpoint says; where it says nothing, the training's global crop and the paper's share of it.
    """
    if size := facts.get("evaluation"):
        return size["resize_px"], size["crop_px"]
    crop_px = facts["params"]["global_px"]
    return round(crop_px * RESIZE_OVER_CROP), crop_px
