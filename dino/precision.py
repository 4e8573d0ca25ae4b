"""Which arithmetic the matrix products use: what the device really does fast, resolved once."""

import time

import torch

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRIAL_SIZE = 256  # of a trial product: 0.3 ms in fp32 on a core, and still short where bf16 is emulated
TRIALS = 3
CLEARLY_FASTER = 1.25


def _fastest_product_s(dtype: torch.dtype) -> float:
    matrix = torch.ones(TRIAL_SIZE, TRIAL_SIZE, dtype=dtype)
    seconds = []
    for _ in range(TRIALS + 1):  # the first one warms up
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def computes_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 products are clearly faster than fp32 ones.

    A GPU's capability says so. On a CPU it is measured: flags are no guide, since a product in emulated bf16 can be
    hundreds of times slower than in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return CLEARLY_FASTER * _fastest_product_s(torch.bfloat16) < _fastest_product_s(torch.float32)
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16 for auto, fp32 or bf16.

    Raises:
        ValueError: bf16 asked of a device that would emulate it.
    """
    if name == "auto":
        return "bf16" if computes_bf16_fast(device) else "fp32"
    if name == "bf16" and not computes_bf16_fast(device):
        raise ValueError(
            f"pretrain.precision is bf16, which this {device.type} computes slower than fp32: choose auto or fp32"
        )
    return name
