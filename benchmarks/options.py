"""Options that several benchmarks share."""

import argparse

import torch

from dino.config import VITS, PretrainConfig
from dino.networks import backbone_arch


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the device, and how often to measure."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])
    options.add_argument("--steps", type=int, default=5, help="measured rounds; each contestant has a turn in each")
    options.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: for one thread on busy cores")
    return options


def add_network(options: argparse.ArgumentParser) -> None:
    """Network, head, crops and batch."""
    options.add_argument("--arch", default="vit_small", choices=VITS)
    options.add_argument("--patch-size", type=int, default=16)
    options.add_argument("--global-px", type=int, default=224)
    options.add_argument("--local-px", type=int, default=96)
    options.add_argument("--local-crops", type=int, default=8)
    options.add_argument("--out-dim", type=int, default=65536)
    options.add_argument("--batch", type=int, default=4)


def network_config(chosen: argparse.Namespace, **more: object) -> PretrainConfig:
    """The paper's settings but for what was chosen."""
    names = ("arch", "patch_size", "global_px", "local_px", "local_crops", "out_dim", "batch")
    return PretrainConfig(**{name: getattr(chosen, name) for name in names} | more)


def device_of(chosen: argparse.Namespace) -> torch.device:
    """The device; products of fp32 stay fp32."""
    return torch.device(chosen.device)


def forward_flop(config: PretrainConfig, px: int) -> int:
    """Floating-point operations of one crop through backbone and head, all tokens through all blocks.

    2 for a multiplication and its addition; products only: patches, qkv and projection (8 T D^2), MLP (16 T D^2),
    attention (4 T^2 D), head.
    """
    arch = backbone_arch(config, channels=3)
    tokens, width = (px // config.patch_size) ** 2 + 1, arch["embed_dim"]
    patches = 2 * (tokens - 1) * 3 * config.patch_size**2 * width
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    hidden, bottleneck = config.hidden_dim, config.bottleneck_dim
    head = 2 * (width * hidden + hidden**2 * (config.head_layers - 2) + hidden * bottleneck)
    return patches + arch["depth"] * block + head + 2 * bottleneck * config.out_dim


def step_flop(config: PretrainConfig) -> int:
    """Of one step of the plain algorithm: the teacher's forward, the student's forward and backward (twice that)."""
    teacher = 2 * forward_flop(config, config.global_px)
    locals_ = config.local_crops * forward_flop(config, config.local_px) if config.local_crops else 0
    return config.batch * (teacher + 3 * (teacher + locals_))
