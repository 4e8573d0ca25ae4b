"""Counter-based random draws: every draw is a pure function of (seed, purpose, step, row, index).

So a resumed run needs no generator state, and draws depend neither on the number of ranks nor on the device: they are
made on the CPU by integer arithmetic (splitmix64's finaliser) and are small next to the images they steer.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FRACTION_BITS = 53  # all that a float64 in [0, 1) holds

# Purposes: each use of randomness has its own stream.
ORDER = 1
CROPS = 1000  # + view
DROP_PATH = 2000  # + view
LINEAR = 3000  # crops of the linear evaluation


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX_2)
    return x ^ _shifted(x, 31)


def _bits(seed: int, purpose: int, step: int, rows: Tensor) -> Tensor:
    key = 0
    for part in (seed, purpose, step):
        key = _mix_int((key + (part + 1) * _GOLDEN) & _MASK)
    return _mix(rows.to(torch.int64) * _signed(_GOLDEN) + _signed(key))


def uniform(seed: int, purpose: int, step: int, rows: Tensor, count: int) -> Tensor:
    """Draws of [0, 1) for each row, float64 [len(rows), count]; draw i of a row does not depend on `count`."""
    counters = (torch.arange(count) + 1) * _signed(_GOLDEN)
    bits = _mix(_bits(seed, purpose, step, rows)[:, None] + counters)
    return _shifted(bits, 64 - _FRACTION_BITS).to(torch.float64) * 2.0**-_FRACTION_BITS


def epoch_order(seed: int, epoch: int, images: int) -> Tensor:
    """A random permutation of the images for this epoch, int64 [images]."""
    return torch.argsort(_bits(seed, ORDER, epoch, torch.arange(images)), stable=True)
