"""Settings of a pretraining, validated: every problem in one error, with place and cure. Needs no torch: loads fast."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import inf

VITS = ("vit_tiny", "vit_small", "vit_base")  # ours
TORCHVISION = (  # those of torchvision that give pooled features for images of any size
    "convnext_tiny", "convnext_small", "convnext_base", "convnext_large",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf",
    "regnet_x_32gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf", "regnet_y_16gf",
    "regnet_y_32gf", "regnet_y_128gf",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b",
    "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
OPTIMIZERS = ("adamw", "sgd", "lars")
RANDOM_WEIGHTS = "weights/random"  # names weights drawn from the seed; the file is there for DVC, and not read
PRECISIONS = ("auto", "fp32", "bf16")
GLOBAL_CROPS = 2


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What chooses the result of a pretraining; params.yaml's section `pretrain` says each field's unit and effect.

    Raises:
        ValueError: Values out of range or that contradict each other, all of them in one message.
    """

    seed: int = 0
    epochs: int = 100
    batch: int = 256
    micro_batches: int = 1
    snapshot_epochs: int = 10

    initial_weights: str = RANDOM_WEIGHTS
    arch: str = "vit_small"
    patch_size: int = 16
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    drop_path_rate: float = 0.1
    init_std: float | None = 0.02
    position_std: float = 0.02

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    head_layers: int = 3
    norm_last_layer: bool = True
    head_batch_norm: bool = False

    global_px: int = 224
    local_px: int = 96
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_p: float = 0.2
    blur_p: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_p: tuple[float, float, float] = (0.0, 0.2, 0.0)

    student_temp: float = 0.1
    teacher_temp_start: float = 0.04
    teacher_temp: float = 0.04
    teacher_temp_warmup_epochs: int = 0
    center_momentum: float = 0.9

    optimizer: str = "adamw"
    lr_at_256: float = 5e-4
    lr_final: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: float = 0.04
    weight_decay_final: float = 0.4
    clip_norm: float = 3.0
    freeze_last_layer_epochs: float = 1
    ema_momentum: float = 0.996

    precision: str = "auto"
    compile: bool = False
    deterministic: bool = True

    @property
    def lr_peak(self) -> float:
        """Learning rate after the warm-up: lr_at_256 * batch / 256."""
        return self.lr_at_256 * self.batch / 256

    @property
    def views(self) -> int:
        """Crops of an image, V."""
        return GLOBAL_CROPS + self.local_crops

    @property
    def crop_sizes_px(self) -> list[int]:
        """Sides of the square crops that the network sees."""
        return [self.global_px, self.local_px] if self.local_crops else [self.global_px]

    def __post_init__(self) -> None:
        """Check every value and combination."""
        if found := problems(self):
            raise ValueError("\n".join(found))


def _ranges(c: PretrainConfig) -> list[tuple[bool, str, str]]:
    """(holds, field, cure) of each single value."""
    shares = ("flip", "jitter_p", "grayscale_p", "center_momentum", "ema_momentum")
    at_least_one = ("epochs", "batch", "micro_batches", "snapshot_epochs", "patch_size", "out_dim", "hidden_dim",
                    "bottleneck_dim", "head_layers", "global_px", "local_px")  # fmt: skip
    positive = ("position_std", "student_temp", "teacher_temp_start", "teacher_temp", "lr_at_256")
    not_negative = ("seed", "local_crops", "brightness", "contrast", "saturation", "lr_final", "warmup_epochs",
                    "weight_decay", "weight_decay_final", "clip_norm", "freeze_last_layer_epochs",
                    "teacher_temp_warmup_epochs")  # fmt: skip
    optional = [name for name in ("embed_dim", "depth", "num_heads") if getattr(c, name) is not None]
    return [
        *((0 <= getattr(c, name) <= 1, name, "choose a share from 0 to 1") for name in shares),
        *((getattr(c, name) >= 1, name, "choose 1 or more") for name in (*at_least_one, *optional)),
        *((0 < getattr(c, name) < inf, name, "choose more than 0") for name in positive),
        *((0 <= getattr(c, name) < inf, name, "choose 0 or more") for name in not_negative),
        (c.seed < 2**63, "seed", "choose less than 2 ** 63"),
        *((len(getattr(c, name)) == 3 and all(0 <= p <= 1 for p in getattr(c, name)), name,
           "choose three shares from 0 to 1") for name in ("blur_p", "solarize_p")),
        *((_is_range(getattr(c, name)) and getattr(c, name)[1] <= 1, name, "choose 0 < low <= high <= 1")
          for name in ("global_scale", "local_scale")),
        *((_is_range(getattr(c, name)), name, "choose two numbers, 0 < low <= high")
          for name in ("ratio", "blur_radius")),
        (c.init_std is None or 0 < c.init_std < inf, "init_std", "choose more than 0, or null"),
        (0 <= c.hue <= 0.5, "hue", "choose a share of the colour circle from 0 to 0.5"),
        (0 <= c.drop_path_rate < 1, "drop_path_rate", "choose a share from 0 to below 1"),
        (c.optimizer in OPTIMIZERS, "optimizer", _choice(c.optimizer, OPTIMIZERS)),
        (c.precision in PRECISIONS, "precision", _choice(c.precision, PRECISIONS)),
        (c.arch in (*VITS, *TORCHVISION) or c.arch.startswith("timm/"), "arch", _arch_choice(c.arch)),
    ]  # fmt: skip


def _is_range(bounds: tuple[float, ...]) -> bool:
    return len(bounds) == 2 and 0 < bounds[0] <= bounds[1] < inf


def _choice(value: str, choices: tuple[str, ...]) -> str:
    return f"{_did_you_mean(value, choices)}choose one of {', '.join(choices)}"


def _arch_choice(value: str) -> str:
    hint = _did_you_mean(value, (*VITS, *TORCHVISION))
    return f"{hint}choose {', '.join(VITS)}, a name of torchvision (resnet50, ...: docs/backbones.md) or timm/NAME"


def _did_you_mean(value: str, choices: tuple[str, ...]) -> str:
    close = get_close_matches(value, choices, n=1)
    return f"did you mean {close[0]}? " if close else ""


def problems(c: PretrainConfig) -> list[str]:
    """Every problem in plain words: field, value, cure."""
    found = [f"{name} is {getattr(c, name)!r}: {cure}" for holds, name, cure in _ranges(c) if not holds]
    if found:
        return found  # combinations of impossible values say nothing more
    if c.arch not in VITS and c.drop_path_rate:
        found.append(f"drop_path_rate is {c.drop_path_rate}: {c.arch} is trained without; choose 0, or a vit_*")
    for name in ("global_px", "local_px"):
        if c.arch in VITS and getattr(c, name) % c.patch_size and (name == "global_px" or c.local_crops):
            below = max(getattr(c, name) // c.patch_size, 1) * c.patch_size
            found.append(
                f"{name} is {getattr(c, name)}, not a multiple of patch_size ({c.patch_size}): "
                f"choose {below} or {below + c.patch_size}"
            )
    if c.batch % c.micro_batches:
        found.append(
            f"batch ({c.batch}) does not divide into micro_batches ({c.micro_batches}): choose a divisor of it"
        )
    found += [
        f"{name} is {getattr(c, name)}, longer than the run of {c.epochs} epochs: choose fewer"
        for name in ("warmup_epochs", "teacher_temp_warmup_epochs")
        if getattr(c, name) > c.epochs
    ]
    if c.embed_dim is not None and c.num_heads is not None and c.embed_dim % c.num_heads:
        found.append(f"num_heads ({c.num_heads}) does not divide embed_dim ({c.embed_dim}): choose a divisor of it")
    if c.precision == "bf16" and c.head_batch_norm:
        found.append("head_batch_norm with precision bf16 loses its statistics: choose precision fp32")
    return found


FIELD_NAMES = tuple(f.name for f in fields(PretrainConfig))
