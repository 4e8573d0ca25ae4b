"""Which arithmetic the matrix products use: resolved once, by what the device has and never by a clock.

The choice is part of a training's KEY and changes its bytes, so the same kind of device must always choose the same.
"""

import torch

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16 for auto, fp32 or bf16.

    auto is bf16 on CUDA that has it and fp32 everywhere else: CPUs differ too much to give one result otherwise.

    Raises:
        ValueError: bf16 asked of a device that would emulate it.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    if name == "bf16" and not has_bf16(device):
        raise ValueError(
            f"pretrain.precision is bf16, which this {device.type} would emulate, hundreds of times slower than fp32: "
            "choose auto or fp32"
        )
    return name
