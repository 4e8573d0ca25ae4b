"""Projection head (paper section 3.1, appendix C): MLP, L2 normalisation, weight-normalised last layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.vision_transformer import init_linear


class WeightNormLinear(nn.Module):
    """Linear without bias whose row k is weight_g[k] * weight_v[k] / |weight_v[k]|.

    A module of our own because torch's parametrised weight_norm renames the parameters of the official checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int, trainable_norm: bool) -> None:
        super().__init__()
        initial = nn.Linear(in_dim, out_dim, bias=False)  # torch's own initialisation, as in the reference
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=trainable_norm)
        self.weight_v = nn.Parameter(initial.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        # one pass over K rows forward and one backward; written out, autograd makes six, and keeps three K x D tensors
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """Maps features [N, in_dim] to prototype scores [N, out_dim].

    Args:
        in_dim: Width of the backbone's features.
        out_dim: Prototypes K.
        use_bn: BatchNorm after each hidden Linear.
        norm_last_layer: Freeze the norm of the last layer's rows at 1 (steadier; advised for ViT-Base).
        nlayers: Linear layers of the MLP.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width that is L2-normalised before the last layer.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers is {nlayers}; the projection head needs at least one layer")
        self.mlp: nn.Module
        if nlayers == 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for layer in range(nlayers - 1):
                layers.append(nn.Linear(in_dim if layer == 0 else hidden_dim, hidden_dim))
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
            layers.append(nn.Linear(hidden_dim, bottleneck_dim))
            self.mlp = nn.Sequential(*layers)
        self.mlp.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, trainable_norm=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """Prototype scores before any temperature, [N, out_dim]."""
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))
