"""The paper's pseudocode, written plainly in the reference's structure, to be timed beside `dino`.

Every shortcut of ours is left out on purpose: attention as explicit products, all tokens through the last block,
stochastic depth by masks, the loss pair by pair, gradients clipped, averaged and looked at one parameter at a time.
tests/benchmarks holds it to the golden trajectory.

Legend: N images, C channels, H x W pixels, T tokens (CLS first), D width; B images of a batch, V views, K prototypes.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.config import PretrainConfig
from dino.pretrain import StepSettings

TEACHER_VIEWS = 2


class DropPath(nn.Module):
    """Stochastic depth: the branch is computed and multiplied by a mask."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_NTD: Tensor) -> Tensor:
        """Zero for dropped images, divided by the probability of the kept ones."""
        if self.rate == 0.0 or not self.training:
            return branch_NTD
        keep = 1.0 - self.rate
        mask_N11 = (torch.rand(len(branch_NTD), 1, 1, device=branch_NTD.device) < keep).to(branch_NTD.dtype)
        return branch_NTD / keep * mask_N11


class Attention(nn.Module):
    """Multi-head attention as two explicit products."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        N, T, D = x_NTD.shape
        q, k, v = self.qkv(x_NTD).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim: int, heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        x_NTD = x_NTD + self.drop_path(self.attn(self.norm1(x_NTD)))
        return x_NTD + self.drop_path(self.mlp(self.norm2(x_NTD)))


class PatchEmbed(nn.Module):
    """Patches by a strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, T - 1, D]."""
        return self.proj(images_NCHW).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """ViT whose output is the CLS token after the final norm; parameter names are the official checkpoints'."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        rates = [layer / max(depth - 1, 1) * drop_path_rate for layer in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def position(self, height: int, width: int) -> Tensor:
        """[1, T, D] for a crop of this size, interpolated at each call."""
        grid, D = math.isqrt(self.pos_embed.shape[1] - 1), self.pos_embed.shape[-1]
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows == columns == grid:
            return self.pos_embed
        square = self.pos_embed[:, 1:].reshape(1, grid, grid, D).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D]."""
        x = self.patch_embed(images_NCHW)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position(*images_NCHW.shape[-2:])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class WeightNorm(nn.Module):
    """Linear without bias, rows of norm 1."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.randn(out_dim, in_dim) * in_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Head(nn.Module):
    """Three Linears, L2 normalisation, weight-normalised last layer."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = WeightNorm(bottleneck_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[N, in_dim] -> [N, K]."""
        return self.last_layer(F.normalize(self.mlp(features), dim=-1, p=2))


class MultiCrop(nn.Module):
    """Crops of one resolution pass the backbone together, the head runs once."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """V crops [B, C, H, W] -> [V * B, K]."""
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-1])]
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in groups]))


def pair_loss(student_out: Tensor, teacher_out: Tensor, center: Tensor, student_temp: float, teacher_temp: float):  # type: ignore[no-untyped-def]
    """Mean cross-entropy over pairs of different views, one pair at a time."""
    views = len(student_out) // (len(teacher_out) // TEACHER_VIEWS)
    students = (student_out / student_temp).chunk(views)
    teachers = torch.softmax((teacher_out - center) / teacher_temp, dim=-1).detach().chunk(TEACHER_VIEWS)
    total, pairs = torch.zeros((), dtype=student_out.dtype, device=student_out.device), 0
    for q, target in enumerate(teachers):
        for v, scores in enumerate(students):
            if v != q:
                total = total + (-target * F.log_softmax(scores, dim=-1)).sum(dim=-1).mean()
                pairs += 1
    return total / pairs


def moved_center(center: Tensor, teacher_out: Tensor, momentum: float) -> Tensor:
    """The centre after this batch."""
    batch_center = teacher_out.sum(dim=0, keepdim=True) / len(teacher_out)
    return center * momentum + batch_center * (1 - momentum)


class PlainDino:
    """Student, teacher, AdamW and centre, and the step that moves them."""

    def __init__(self, student: MultiCrop, teacher: MultiCrop, out_dim: int) -> None:
        self.student, self.teacher = student, teacher
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
        first = next(student.parameters())
        self.center = torch.zeros(1, out_dim, dtype=first.dtype, device=first.device)
        self.optimizer = torch.optim.AdamW(list(self._groups()))

    def _groups(self) -> Iterator[dict[str, list[nn.Parameter]]]:
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        yield {"params": [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]}
        yield {"params": [p for name, p in named if name.endswith(".bias") or p.ndim == 1]}

    def step(self, crops: Sequence[Tensor], settings: StepSettings, config: PretrainConfig) -> float:
        """Algorithm 1 once; the loss.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = settings.lr
            if number == 0:
                group["weight_decay"] = settings.weight_decay
            else:
                group["weight_decay"] = 0.0
        with torch.no_grad():
            teacher_out = self.teacher(crops[:TEACHER_VIEWS])
        student_out = self.student(crops)
        loss = pair_loss(student_out, teacher_out, self.center, config.student_temp, settings.teacher_temp)
        self.center = moved_center(self.center, teacher_out, config.center_momentum)
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                coefficient = config.clip_norm / (parameter.grad.norm(2) + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)
        if settings.freeze_last_layer:
            for name, parameter in self.student.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            m = settings.ema_momentum
            for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                own.mul_(m).add_((1 - m) * other.detach())
        return loss.item()
