"""What decays, clipping and freezing (paper appendix; METHOD of the reference: per-parameter clipping)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

CLIP_EPS = 1e-6


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay leaves out biases and one-dimensional parameters (norms); position embedding and CLS decay."""
    return not (name.endswith(".bias") or parameter.ndim == 1)


def parameter_groups(module: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Two groups of the trainable parameters: with weight decay first, without second."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if decays(name, p)]},
        {"params": [p for name, p in named if not decays(name, p)]},
    ]


def build_optimizer(module: nn.Module) -> torch.optim.AdamW:
    """AdamW over the two groups; learning rate and weight decay are set anew each step."""
    return torch.optim.AdamW(parameter_groups(module), fused=True)


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """This step's values; weight decay on the decayed group only."""
    decayed, not_decayed = optimizer.param_groups
    decayed.update(lr=lr, weight_decay=weight_decay)
    not_decayed.update(lr=lr, weight_decay=0.0)


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each gradient whose own norm exceeds max_norm to it; no clipping where max_norm is 0.

    Returns:
        Norm of each gradient before clipping, [number of gradients].
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if max_norm > 0:
        coefficients = (max_norm / (torch.stack(norms) + CLIP_EPS)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(coefficients.unbind()))
    return torch.stack(norms)


def freeze_last_layer(module: nn.Module) -> None:
    """Drop the last layer's gradients, so that moments and weight decay leave it alone too (lr = 0 would not)."""
    for name, parameter in module.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
