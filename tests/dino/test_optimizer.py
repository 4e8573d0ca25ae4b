"""What decays, clipping by each gradient's own norm, freezing: the reference's lists and numbers."""

import pytest
import torch
from torch import nn

from dino.head import DINOHead
from dino.multicrop import MultiCropWrapper
from dino.optimizer import clip_each_gradient, decays, freeze_last_layer, parameter_groups
from dino.vision_transformer import VisionTransformer


def wrapper(norm_last_layer: bool = True) -> MultiCropWrapper:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    head = DINOHead(16, 48, norm_last_layer=norm_last_layer, hidden_dim=40, bottleneck_dim=16)
    return MultiCropWrapper(backbone, head)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def test_golden_parameter_groups(golden) -> None:
    reference = golden("optimizer")
    model = wrapper()
    decayed, not_decayed = (names_of(model, group["params"]) for group in parameter_groups(model))
    assert decayed == reference.names("decayed")
    assert not_decayed == reference.names("not_decayed")


def test_trainable_norms_of_the_last_layer_decay() -> None:
    model = wrapper(norm_last_layer=False)
    decayed, not_decayed = (names_of(model, group["params"]) for group in parameter_groups(model))
    assert "head.last_layer.weight_g" in decayed
    assert len(decayed) + len(not_decayed) == len(list(model.parameters()))


def test_decay_is_decided_by_name_or_dimension() -> None:
    assert not decays("x.bias", torch.zeros(2, 2))
    assert not decays("norm.weight", torch.zeros(2))
    assert decays("pos_embed", torch.zeros(1, 2, 2)) and decays("biased.weight", torch.zeros(2, 2))


def test_golden_clipping_and_freezing(golden) -> None:
    reference = golden("optimizer")
    model = wrapper()
    before, after = reference.under("before/"), reference.under("after/")
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.grad = before[name].clone()
    norms = clip_each_gradient(model.parameters(), float(reference["clip"]))
    expected_norms = [before[name].norm() for name, _ in model.named_parameters() if name in before]
    torch.testing.assert_close(norms, torch.stack(expected_norms))
    assert (norms > 3).any()
    freeze_last_layer(model)
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(left) == set(after)
    assert set(before) - set(left) == set(reference.names("frozen_first_epoch"))
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, after[name], rtol=1e-6, atol=1e-7)


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    gradients = [[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]
    for parameter, gradient in zip(parameters, gradients, strict=False):  # the last one has none
        parameter.grad = torch.tensor(gradient)
    norms = clip_each_gradient(parameters, 1.0)
    assert norms.tolist() == pytest.approx([5.0, 0.5, 0.0])
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 4.0]) / (5 + 1e-6), rtol=1e-7, atol=0)
    assert parameters[1].grad.tolist() == torch.tensor([0.3, 0.4]).tolist()  # below 1: untouched
    assert parameters[2].grad.tolist() == [0.0, 0.0]


def test_no_clipping_at_zero() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([300.0, 400.0])
    assert clip_each_gradient([parameter], 0.0).tolist() == [500.0]
    assert parameter.grad.tolist() == [300.0, 400.0]


def test_a_frozen_last_layer_is_left_alone_by_moments_and_decay() -> None:
    model = wrapper(norm_last_layer=False)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.1, weight_decay=0.5)
    last = list(model.head.last_layer.parameters())
    before = [p.detach().clone() for p in last]
    model([torch.randn(2, 3, 8, 8)]).square().sum().backward()
    freeze_last_layer(model)
    optimizer.step()
    for parameter, old in zip(last, before, strict=True):
        torch.testing.assert_close(parameter, old, rtol=0, atol=0)
        assert parameter not in optimizer.state
    assert all(p in optimizer.state for p in model.head.mlp.parameters())
