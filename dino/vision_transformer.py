"""Vision Transformer for crops of any size (paper section 3.1; state dict keys of the official checkpoints).

Shapes: N images, C channels, H x W pixels, T tokens (CLS first), D embedding width.
"""

import math
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # the reference's named sizes; torch's default is 1e-5
INIT_STD = 0.02
SDPA_MIN_TOKENS = 128  # below this, on a CPU, explicit attention is faster than the fused kernel


def init_linear(module: nn.Module, std: float | None = INIT_STD) -> None:
    """Truncated normal for Linear weights, zero biases; everything else keeps torch's initialisation.

    A std of None is 1 / sqrt(inputs): the fixed .02 is made for widths of hundreds, and in a narrow network all but
    mutes the branches beside the residual stream.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std or module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@lru_cache(maxsize=64)
def position_resampling(grid: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix [rows * columns, grid * grid] of the reference's bicubic resampling of position embeddings.

    Bicubic resampling is linear in the embedding, so one small matrix does it: a product whose gradient is
    repeatable on every device, which the interpolation's own is not. The scale (size + .1) / grid is the reference's.
    """
    with torch.inference_mode(False):  # remembered: a matrix made in inference mode could not train later
        basis = torch.eye(grid * grid, dtype=dtype).reshape(1, grid * grid, grid, grid)
        scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
        resampled = F.interpolate(basis, scale_factor=scale, mode="bicubic", align_corners=False)
        assert resampled.shape[-2:] == (rows, columns)
        return resampled.reshape(grid * grid, rows * columns).T.contiguous().to(device)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected linearly to D."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, H/p * W/p, D]; written as a product, which is faster than a strided convolution."""
        N, C, H, W = images_NCHW.shape
        p = self.patch_size
        patches = images_NCHW.reshape(N, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(N, (H // p) * (W // p), C * p * p), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x_NTD: Tensor) -> Tensor:
        N, T, D = x_NTD.shape
        return x_NTD.reshape(N, T, self.num_heads, D // self.num_heads).transpose(1, 2)

    def _qkv(self, x_NTD: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of q for the first `queries` tokens, of k and v for all."""
        D = x_NTD.shape[-1]
        if queries == x_NTD.shape[1]:
            q, k, v = self.qkv(x_NTD).chunk(3, dim=-1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x_NTD[:, :queries], weight[:D], None if bias is None else bias[:D])
            k, v = F.linear(x_NTD, weight[D:], None if bias is None else bias[D:]).chunk(2, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def forward(self, x_NTD: Tensor, queries: int) -> Tensor:
        """Attended values of the first `queries` tokens, [N, queries, D]."""
        N, T, D = x_NTD.shape
        q, k, v = self._qkv(x_NTD, queries)
        if x_NTD.device.type == "cpu" and T < SDPA_MIN_TOKENS:
            out = torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(N, queries, D))

    def weights(self, x_NTD: Tensor) -> Tensor:
        """Attention weights, [N, heads, T, T]."""
        q, k, _ = self._qkv(x_NTD, x_NTD.shape[1])
        return torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth on both residual branches."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def _attend(self, x_NTD: Tensor, queries: int) -> Tensor:
        return self.attn(self.norm1(x_NTD), queries)

    def _feed(self, x_NTD: Tensor) -> Tensor:
        return self.mlp(self.norm2(x_NTD))

    def forward(self, x_NTD: Tensor, queries: int, uniform_2N: Tensor | None) -> Tensor:
        """The first `queries` tokens after this block, [N, queries, D].

        uniform_2N holds one draw of [0, 1) per residual branch and image: a branch is dropped where the draw is
        below the rate. A dropped branch is not computed.
        """
        kept = x_NTD[:, :queries]
        if uniform_2N is None or self.drop_path_rate == 0.0:
            kept = kept + self._attend(x_NTD, queries)
            return kept + self._feed(kept)
        keep_probability = 1.0 - self.drop_path_rate
        attended, fed = (torch.nonzero(u >= self.drop_path_rate)[:, 0].to(x_NTD.device) for u in uniform_2N.cpu())
        branch = self._attend(x_NTD[attended], queries) / keep_probability
        kept = kept.index_add(0, attended, branch.to(kept.dtype))
        branch = self._feed(kept[fed]) / keep_probability
        return kept.index_add(0, fed, branch.to(kept.dtype))


class VisionTransformer(nn.Module):
    """ViT whose output is the CLS token after the final norm.

    Args:
        img_size: Side in pixels of the square image that the position embedding is made for; others are resampled.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        embed_dim: Width D.
        depth: Blocks.
        num_heads: Attention heads; must divide embed_dim.
        mlp_ratio: Hidden width of the MLP over D.
        qkv_bias: Biases of query, key and value.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 with depth; acts in train mode.
        init_std: Of the initial Linear weights; None is 1 / sqrt(inputs), for networks narrower than the paper's.
        position_std: Of the initial position embedding and CLS token; where objects stand in fixed places (small,
            centred images), more than the paper's .02 lets the place count from the start.

    Raises:
        ValueError: embed_dim not divisible by num_heads, or an image size not divisible by patch_size.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        init_std: float | None = INIT_STD,
        position_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide embed_dim ({embed_dim})")
        if img_size % patch_size:
            raise ValueError(f"patch_size ({patch_size}) must divide img_size ({img_size})")
        self.arch: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "drop_path_rate": drop_path_rate,
            "init_std": init_std,
            "position_std": position_std,
        }
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        rates = torch.linspace(0.0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        nn.init.trunc_normal_(self.pos_embed, std=position_std)
        nn.init.trunc_normal_(self.cls_token, std=position_std)
        self.apply(partial(init_linear, std=init_std))

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Position embedding [1, T, D] for an image of this size in pixels."""
        rows, columns = height // self.patch_size, width // self.patch_size
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if rows == columns == grid:
            return self.pos_embed
        matrix = position_resampling(grid, rows, columns, self.pos_embed.dtype, self.pos_embed.device)
        return torch.cat([self.pos_embed[:, :1], (matrix @ self.pos_embed[0, 1:])[None]], dim=1)

    def tokens(self, images_NCHW: Tensor) -> Tensor:
        """Embedded patches behind the CLS token, positions added, [N, T, D]."""
        height, width = images_NCHW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide into patches of {self.patch_size}; "
                f"choose a crop size that is a multiple of {self.patch_size}"
            )
        position = self.position_embedding(height, width)
        patches = self.patch_embed(images_NCHW) + position[:, 1:]
        cls = (self.cls_token + position[:, :1]).expand(patches.shape[0], -1, -1)
        return torch.cat([cls.to(patches.dtype), patches], dim=1)

    def drop_path_draws(self, images: int) -> Tensor | None:
        """Draws of torch's global generator for stochastic depth, [depth, 2, N]; None where nothing is dropped."""
        if not self.training or self.arch["drop_path_rate"] == 0.0:
            return None
        return torch.rand(len(self.blocks), 2, images)

    def forward(self, images_NCHW: Tensor, uniform_L2N: Tensor | None = None) -> Tensor:
        """CLS token of the last block after the final norm, [N, D].

        Only that token feeds the loss, so the last block computes no other (exact: nothing else reads them).

        Args:
            images_NCHW: Normalised images; H and W multiples of patch_size.
            uniform_L2N: Draws of [0, 1) for stochastic depth, [depth, 2, N] on the CPU; default: torch's generator.
        """
        x_NTD = self.tokens(images_NCHW)
        if uniform_L2N is None:
            uniform_L2N = self.drop_path_draws(images_NCHW.shape[0])
        for layer, block in enumerate(self.blocks):
            queries = 1 if layer == len(self.blocks) - 1 else x_NTD.shape[1]
            x_NTD = block(x_NTD, queries, None if uniform_L2N is None else uniform_L2N[layer])
        return self.norm(x_NTD)[:, 0]

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Tokens of images x [N, C, H, W] after each of the last n blocks and the final norm, [N, T, D] each."""
        x_NTD = self.tokens(x)
        layers = []
        for layer, block in enumerate(self.blocks):
            x_NTD = block(x_NTD, x_NTD.shape[1], None)
            if layer >= len(self.blocks) - n:
                layers.append(self.norm(x_NTD))
        return layers

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block for images x [N, C, H, W], [N, heads, T, T]."""
        x_NTD = self.tokens(x)
        for block in list(self.blocks)[:-1]:
            x_NTD = block(x_NTD, x_NTD.shape[1], None)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x_NTD))  # type: ignore[operator, union-attr]


def vit_tiny(patch_size: int = 16, **settings: Any) -> VisionTransformer:
    """ViT-Tiny: width 192, 12 blocks, 3 heads."""
    return VisionTransformer(**{"patch_size": patch_size, **NAMED_SIZES["vit_tiny"], **settings})


def vit_small(patch_size: int = 16, **settings: Any) -> VisionTransformer:
    """ViT-Small: width 384, 12 blocks, 6 heads."""
    return VisionTransformer(**{"patch_size": patch_size, **NAMED_SIZES["vit_small"], **settings})


def vit_base(patch_size: int = 16, **settings: Any) -> VisionTransformer:
    """ViT-Base: width 768, 12 blocks, 12 heads."""
    return VisionTransformer(**{"patch_size": patch_size, **NAMED_SIZES["vit_base"], **settings})


NAMED_SIZES: dict[str, dict[str, int]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
