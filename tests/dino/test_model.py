"""Student and teacher: separate objects, one start, no gradient, EMA over parameters only."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from dino.config import PretrainConfig
from dino.ema import ema_update
from dino.model import DINO, DINOHead, MultiCropWrapper, VisionTransformer, dino_loss, vit_base, vit_small, vit_tiny
from dino.networks import build_dino


def backbone(seed: int, **settings) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**{**sizes, **settings})


def head(seed: int, **settings) -> DINOHead:
    torch.manual_seed(seed)
    return DINOHead(24, 32, hidden_dim=28, bottleneck_dim=12, **settings)


def small_dino(**settings) -> DINO:
    return DINO(backbone(0), backbone(1), head(2, **settings), head(3, **settings)).double()


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 3, px, px, generator=generator, dtype=torch.float64) for px in (16, 16, 8, 8, 8)]


def test_the_teacher_starts_as_the_student_and_is_another_object() -> None:
    dino = small_dino()
    student, teacher = dino.student.state_dict(), dino.teacher.state_dict()
    assert student.keys() == teacher.keys()
    for name, tensor in student.items():
        torch.testing.assert_close(teacher[name], tensor, rtol=0, atol=0)
        assert teacher[name].data_ptr() != tensor.data_ptr(), name
    assert not any(p.requires_grad for p in dino.teacher.parameters())
    assert all(p.requires_grad for p in dino.student.backbone.parameters())


def test_the_student_sees_all_crops_and_the_teacher_the_globals() -> None:
    dino = small_dino()
    views = crops()
    student_out, teacher_out = dino(views)
    assert student_out.shape == (5 * 2, 32) and teacher_out.shape == (2 * 2, 32)
    torch.testing.assert_close(student_out, dino.student(views))
    torch.testing.assert_close(teacher_out, dino.teacher(views[:2]))
    assert student_out.requires_grad and not teacher_out.requires_grad


def test_update_teacher_is_the_moving_average_of_every_parameter() -> None:
    dino = small_dino(norm_last_layer=False)
    before = {name: p.clone() for name, p in dino.teacher.named_parameters()}
    with torch.no_grad():
        for p in dino.student.parameters():
            p += torch.randn_like(p)
    student = {name: p.clone() for name, p in dino.student.named_parameters()}
    dino.update_teacher(0.9)
    for name, p in dino.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student[name], rtol=0, atol=1e-14)
    for name, p in dino.student.named_parameters():
        torch.testing.assert_close(p, student[name], rtol=0, atol=0)
    dino.update_teacher(0.0)
    for name, p in dino.teacher.named_parameters():
        torch.testing.assert_close(p, student[name], rtol=0, atol=0)
    dino.update_teacher(1.0)
    for name, p in dino.teacher.named_parameters():
        torch.testing.assert_close(p, student[name], rtol=0, atol=0)


def test_batch_norm_buffers_of_the_teacher_are_its_own() -> None:
    dino = small_dino(use_bn=True)
    views = crops()
    dino(views)
    norm_s, norm_t = dino.student.head.mlp[1], dino.teacher.head.mlp[1]
    seen = norm_t.running_mean.clone()
    assert not torch.allclose(seen, norm_s.running_mean)
    assert norm_t.num_batches_tracked == 1  # it is in train mode
    dino.update_teacher(0.5)
    torch.testing.assert_close(norm_t.running_mean, seen, rtol=0, atol=0)
    assert isinstance(norm_t, nn.BatchNorm1d)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_outside_0_1_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"EMA momentum is .* \[0, 1\]"):
        ema_update(nn.Linear(2, 2), nn.Linear(2, 2), momentum)


def test_teacher_and_student_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="same architecture"):
        DINO(backbone(0), backbone(1, depth=3), head(2), head(3))


@pytest.mark.parametrize("shared", ["backbone", "head"])
def test_a_teacher_that_is_the_student_is_refused(shared: str) -> None:
    body, top = backbone(0), head(1)
    with pytest.raises(ValueError, match="separate"):
        DINO(body, body if shared == "backbone" else backbone(2), top, top if shared == "head" else head(3))


def test_fewer_than_two_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="two global crops"):
        small_dino()(crops()[:1])


def test_settings_build_a_student_with_stochastic_depth_and_a_teacher_without() -> None:
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "global_px": 16, "local_px": 8}
    config = PretrainConfig(**sizes, drop_path_rate=0.2, out_dim=32, hidden_dim=28, norm_last_layer=False)
    before = torch.random.get_rng_state()
    dino, again = build_dino(config, channels=1), build_dino(config, channels=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [block.drop_path_rate for block in dino.student.backbone.blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert [block.drop_path_rate for block in dino.teacher.backbone.blocks] == [0.0] * 3
    assert dino.training and dino.student.backbone.patch_embed.proj.in_channels == 1
    assert dino.student.head.last_layer.weight_g.requires_grad
    for name, tensor in dino.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    views = [torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)]
    torch.testing.assert_close(dino.teacher(views), dino.teacher(views), rtol=0, atol=0)
    assert not torch.allclose(dino.student(views), dino.student(views))


# The names and the order that the field uses, and each default ("" where there is none); more may follow.
SIGNATURES: dict[Any, dict[str, Any]] = {
    VisionTransformer: {"img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 768, "depth": 12,
                        "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "drop_path_rate": 0.0},
    VisionTransformer.get_intermediate_layers: {"self": "", "x": "", "n": 1},
    VisionTransformer.get_last_selfattention: {"self": "", "x": ""},
    DINOHead: {"in_dim": "", "out_dim": "", "use_bn": False, "norm_last_layer": True, "nlayers": 3,
               "hidden_dim": 2048, "bottleneck_dim": 256},
    MultiCropWrapper: {"backbone": "", "head": ""},
    dino_loss: {"student_out": "", "teacher_out": "", "center": "", "student_temp": 0.1, "teacher_temp": 0.04,
                "center_momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("named", SIGNATURES, ids=lambda named: named.__qualname__)
def test_the_public_names_take_what_the_field_knows_them_to_take(named: Any) -> None:
    found = {p.name: "" if p.default is p.empty else p.default for p in inspect.signature(named).parameters.values()}
    expected = SIGNATURES[named]
    assert dict(list(found.items())[: len(expected)]) == expected and list(found)[: len(expected)] == list(expected)
    assert all(default != "" for default in list(found.values())[len(expected) :])


@pytest.mark.parametrize(("named", "width", "heads"), [(vit_tiny, 192, 3), (vit_small, 384, 6), (vit_base, 768, 12)])
def test_the_named_sizes_are_ours_to_change(named: Any, width: int, heads: int) -> None:
    found = named(patch_size=8, img_size=16, depth=1)
    assert (found.arch["embed_dim"], found.arch["num_heads"], found.arch["depth"]) == (width, heads, 1)
