"""Every setting that cannot work is refused, all at once, each with its place, its value and a cure."""

import math

import pytest

from dino.config import FIELD_NAMES, PretrainConfig

NAN, INF = math.nan, math.inf
SHARE = "choose a share from 0 to 1"
ONE, POSITIVE, ZERO = "choose 1 or more", "choose more than 0", "choose 0 or more"
BOX, RANGE = "choose 0 < low <= high <= 1", "choose two numbers, 0 < low <= high"
THREE = "choose three shares from 0 to 1"

# field, values that are refused, cure
REFUSED = [
    *((name, [-0.1, 1.1, NAN], SHARE) for name in ("flip", "jitter_p", "grayscale_p")),
    *((name, [-0.1, 1.1, NAN], SHARE) for name in ("center_momentum", "ema_momentum")),
    *((name, [0, -1], ONE) for name in ("epochs", "batch", "micro_batches", "patch_size", "out_dim")),
    *((name, [0, -1], ONE) for name in ("hidden_dim", "bottleneck_dim", "head_layers", "snapshot_epochs")),
    *((name, [0, -1], ONE) for name in ("global_px", "local_px", "embed_dim", "depth", "num_heads")),
    *((name, [0.0, -0.1, NAN, INF], POSITIVE) for name in ("student_temp", "teacher_temp_start", "teacher_temp")),
    ("position_std", [0.0, -0.1, NAN, INF], POSITIVE),
    ("init_std", [0.0, -0.1, NAN, INF], "choose more than 0, or null"),
    ("lr_at_256", [0.0, -0.1, NAN, INF], POSITIVE),
    ("seed", [2**63], "choose less than 2 ** 63"),
    *((name, [-1], ZERO) for name in ("seed", "local_crops", "teacher_temp_warmup_epochs")),
    *((name, [-0.1, NAN, INF], ZERO) for name in ("brightness", "contrast", "saturation", "lr_final")),
    *((name, [-0.1, NAN, INF], ZERO) for name in ("warmup_epochs", "weight_decay", "weight_decay_final")),
    *((name, [-0.1, NAN, INF], ZERO) for name in ("clip_norm", "freeze_last_layer_epochs")),
    *((name, [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)], BOX) for name in ("global_scale", "local_scale")),
    *((name, [(0.0, 1.0), (2.0, 1.0), (NAN, 1.0), (1.0, INF)], RANGE) for name in ("ratio", "blur_radius")),
    *((name, [(0.0, -0.1, 0.0), (0.0, 0.0, 1.1)], THREE) for name in ("blur_p", "solarize_p")),
    ("seed", [2**63], "choose less than 2 ** 63"),
    ("hue", [-0.1, 0.6, NAN], "from 0 to 0.5"),
    ("drop_path_rate", [-0.1, 1.0, NAN], "from 0 to below 1"),
    ("optimizer", ["adam", "SGD"], "choose one of adamw, sgd, lars"),
    ("precision", ["fp16", "bf61"], "choose one of auto, fp32, bf16"),
    ("arch", ["vit_smal", "resnet", "vgg16", "timm"], "choose vit_tiny, vit_small, vit_base, a name of torchvision"),
]
CASES = [(field, value, cure) for field, values, cure in REFUSED for value in values]


@pytest.mark.parametrize(("field", "value", "cure"), CASES, ids=[f"{f}={v}" for f, v, _ in CASES])
def test_a_value_out_of_range_is_refused(field: str, value: object, cure: str) -> None:
    with pytest.raises(ValueError) as error:
        PretrainConfig(**{field: value})
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{field} is {value!r}: ") and cure in line


FREE = {"initial_weights", "norm_last_layer", "head_batch_norm", "compile", "deterministic"}


def test_every_field_has_a_refusal_or_cannot_be_wrong() -> None:
    assert {field for field, _, _ in REFUSED} | FREE == set(FIELD_NAMES)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"global_px": 225}, ["global_px is 225", "patch_size (16)", "choose 224 or 240"]),
        ({"local_px": 100}, ["local_px is 100", "patch_size (16)", "choose 96 or 112"]),
        ({"local_px": 8}, ["local_px is 8", "choose 16 or 32"]),
        ({"batch": 256, "micro_batches": 3}, ["batch (256)", "micro_batches (3)", "choose a divisor"]),
        ({"epochs": 5}, ["warmup_epochs is 10", "run of 5 epochs", "choose fewer"]),
        ({"teacher_temp_warmup_epochs": 101}, ["teacher_temp_warmup_epochs is 101", "run of 100 epochs"]),
        ({"embed_dim": 100, "num_heads": 3}, ["num_heads (3)", "embed_dim (100)", "choose a divisor"]),
        ({"precision": "bf16", "head_batch_norm": True}, ["head_batch_norm", "choose precision fp32"]),
        ({"arch": "vit_smal"}, ["arch is 'vit_smal'", "did you mean vit_small?"]),
        ({"optimizer": "lamb"}, ["optimizer is 'lamb'", "choose one of adamw, sgd, lars"]),
        ({"optimizer": "larz"}, ["optimizer is 'larz'", "did you mean lars?"]),
        ({"arch": "resnet5"}, ["arch is 'resnet5'", "did you mean resnet50?"]),
        ({"arch": "resnet50"}, ["drop_path_rate is 0.1", "resnet50 is trained without; choose 0"]),
        ({"arch": "timm/swin"}, ["drop_path_rate is 0.1", "timm/swin is trained without; choose 0"]),
        ({"precision": "bf61"}, ["precision is 'bf61'", "did you mean bf16?"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        PretrainConfig(**settings)
    (line,) = str(error.value).splitlines()
    assert all(fragment in line for fragment in fragments)


@pytest.mark.parametrize("field", ["blur_p", "solarize_p", "ratio", "blur_radius", "global_scale", "local_scale"])
def test_a_tuple_of_another_length_is_refused(field: str) -> None:
    value = getattr(PretrainConfig(), field)
    for wrong in (value[:-1], (*value, value[-1])):
        with pytest.raises(ValueError, match=field):
            PretrainConfig(**{field: wrong})


def test_all_problems_stand_in_one_error() -> None:
    with pytest.raises(ValueError) as error:
        PretrainConfig(epochs=0, flip=2, arch="vit")
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["flip", "epochs", "arch"]
    with pytest.raises(ValueError) as error:
        PretrainConfig(epochs=1, global_px=30, local_px=10, teacher_temp_warmup_epochs=2)
    places = [line.split()[0] for line in str(error.value).splitlines()]
    assert places == ["global_px", "local_px", "warmup_epochs", "teacher_temp_warmup_epochs"]


def test_corners_are_allowed() -> None:
    PretrainConfig(epochs=10, warmup_epochs=10, teacher_temp_warmup_epochs=10)
    PretrainConfig(local_crops=0, local_px=7, global_scale=(0.14, 1.0))  # a size that nothing has
    PretrainConfig(ema_momentum=1.0, center_momentum=0.0, clip_norm=0.0, flip=0.0, hue=0.5, drop_path_rate=0.0)
    PretrainConfig(global_scale=(1.0, 1.0), blur_radius=(1.0, 1.0), ratio=(1.0, 1.0))
    PretrainConfig(init_std=None)
    PretrainConfig(arch="resnet50", drop_path_rate=0.0, global_px=225, local_px=97)  # a convnet has no patches
    PretrainConfig(global_scale=[0.4, 1.0], blur_p=[0.0, 0.0, 0.0])  # as YAML gives them


def test_defaults_are_the_papers() -> None:
    c = PretrainConfig()
    assert (c.lr_at_256, c.lr_final, c.warmup_epochs) == (5e-4, 1e-6, 10)
    assert (c.weight_decay, c.weight_decay_final, c.ema_momentum, c.center_momentum) == (0.04, 0.4, 0.996, 0.9)
    assert (c.student_temp, c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup_epochs) == (
        0.1, 0.04, 0.04, 0,
    )  # fmt: skip
    assert (c.init_std, c.position_std) == (0.02, 0.02)
    assert (c.clip_norm, c.freeze_last_layer_epochs, c.drop_path_rate) == (3.0, 1, 0.1)
    assert (c.out_dim, c.hidden_dim, c.bottleneck_dim, c.head_layers) == (65536, 2048, 256, 3)
    assert (c.global_px, c.local_px, c.local_crops, c.views) == (224, 96, 8, 10)
    assert (c.global_scale, c.local_scale, c.ratio) == ((0.4, 1.0), (0.05, 0.4), (3 / 4, 4 / 3))
    assert (c.flip, c.jitter_p, c.grayscale_p) == (0.5, 0.8, 0.2)
    assert (c.brightness, c.contrast, c.saturation, c.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (c.blur_p, c.blur_radius, c.solarize_p) == ((1.0, 0.1, 0.5), (0.1, 2.0), (0.0, 0.2, 0.0))


def test_the_peak_of_the_learning_rate_scales_with_the_batch() -> None:
    assert PretrainConfig(batch=64).lr_peak == pytest.approx(5e-4 / 4)
    assert PretrainConfig(batch=1024).lr_peak == pytest.approx(2e-3)
