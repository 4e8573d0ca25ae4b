"""BatchNorm whose statistics are those of the whole batch, over all ranks; torch's own does so on CUDA only.

With one process torch's plain modules stay as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dino.distributed import World


class _Normalise(torch.autograd.Function):
    """x [N, C, ...] -> (x - mean) / sqrt(var + eps) with mean and variance over the rows and places of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised x, and without gradient mean [C], biased variance [C] and the number of values of a channel."""
        others = [dim for dim in range(x.ndim) if dim != 1]
        own_var, own_mean = torch.var_mean(x, others, correction=0)
        own_count = own_mean.new_tensor([x.numel() / x.shape[1]])
        parts = own_mean.new_zeros(world.size, 2 * len(own_mean) + 1)
        parts[world.rank] = torch.cat([own_count, own_mean, own_var])
        count, mean, var = world.sum(parts).split([1, len(own_mean), len(own_mean)], dim=1)
        total = count.sum()
        mean_C = (count * mean).sum(0) / total
        var_C = (count * (var + (mean - mean_C).square())).sum(0) / total
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = (var_C + eps).rsqrt().view(shape)
        normalised = (x - mean_C.view(shape)) * scale
        ctx.save_for_backward(normalised, scale, total)
        ctx.world = world
        ctx.mark_non_differentiable(mean_C, var_C, total)
        return normalised, mean_C, var_C, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        """Of the sum of the ranks' losses: every rank's loss depends on x through the statistics."""
        normalised, scale, total = ctx.saved_tensors
        others = [dim for dim in range(gradient.ndim) if dim != 1]
        sums = torch.stack([gradient.sum(others), (gradient * normalised).sum(others)])
        along_mean, along_scale = (ctx.world.sum(sums) / total).view(2, *scale.shape)
        return (gradient - along_mean - normalised * along_scale) * scale, None, None


class SharedBatchNorm(_BatchNorm):
    """A BatchNorm of torch or timm, with its parameters and buffers, that shares its statistics among the ranks."""

    def __init__(self, plain: _BatchNorm, world: World) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked
        self.world = world
        self.drop = getattr(plain, "drop", nn.Identity())  # timm's are followed by these
        self.act = getattr(plain, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape; in eval mode by the running statistics."""
        if not self.training:
            args = (self.running_mean, self.running_var, self.weight, self.bias)
            return self.act(self.drop(F.batch_norm(x, *args, training=False, eps=self.eps)))
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y, mean_C, var_C, count = _Normalise.apply(wide, self.eps, self.world)
        self._remember(mean_C, var_C * count / (count - 1))
        if self.weight is not None:
            shape = [1, -1] + [1] * (x.ndim - 2)
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(y.to(x.dtype)))

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_var_C.to(self.running_var.dtype), share)


def share_batch_norms(network: nn.Module, world: World) -> nn.Module:
    """The network, where there are several ranks with every BatchNorm replaced by one that they share."""
    if world.size == 1:
        return network
    for path, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, SharedBatchNorm(module, world))
    return network
