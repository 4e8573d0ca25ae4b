"""AdamW, SGD or LARS; what decays, clipping and freezing (paper appendix; the reference clips each parameter alone)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CLIP_EPS = 1e-6
MOMENTUM = 0.9  # of SGD and LARS, as the reference has it
LARS_TRUST = 0.001  # step of a parameter over its own norm, at a learning rate of 1


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay leaves out biases and one-dimensional parameters (norms); position embedding and CLS decay."""
    return not (name.endswith(".bias") or parameter.ndim == 1)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay first, without second."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if decays(name, p)]},
        {"params": [p for name, p in named if not decays(name, p)]},
    ]


class LARS(torch.optim.Optimizer):
    """SGD whose step is in proportion to each parameter's own norm (You et al. 2017), for convnets in large batches.

    One-dimensional parameters (biases, norms) take plain SGD's step, without weight decay.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step: momentum <- .9 momentum + trust (gradient + decay weight), weight <- weight - lr momentum."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    norm, update_norm = parameter.norm(), update.norm()
                    trusted = (norm > 0) & (update_norm > 0)
                    update = update * torch.where(trusted, LARS_TRUST * norm / update_norm, torch.ones_like(norm))
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.mul_(MOMENTUM).add_(update)
                parameter.sub_(buffer, alpha=group["lr"])


def build_optimizer(module: nn.Module, name: str) -> torch.optim.Optimizer:
    """adamw, sgd or lars over the two groups; learning rate and weight decay are set anew each step."""
    groups = parameter_groups(module)
    match name:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, momentum=MOMENTUM)
        case "lars":
            return LARS(groups)
    raise ValueError(f"optimizer is {name!r}; choose adamw, sgd or lars")


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
