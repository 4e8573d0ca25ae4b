"""What decays, clipping by each gradient's own norm, freezing: the reference's lists and numbers."""

import math

import pytest
import torch
from torch import Tensor, nn

from dino.head import DINOHead
from dino.multicrop import MultiCropWrapper
from dino.optimizer import (
    build_optimizer,
    clip_each_gradient,
    decays,
    freeze_last_layer,
    parameter_groups,
    set_schedule,
)
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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_frozen_last_layer_is_left_alone_by_moments_and_decay(name: str) -> None:
    model = wrapper(norm_last_layer=False)
    optimizer = build_optimizer(model, name)
    set_schedule(optimizer, lr=0.1, weight_decay=0.5)
    last = list(model.head.last_layer.parameters())
    before = [p.detach().clone() for p in last]
    model([torch.randn(2, 3, 8, 8)]).square().sum().backward()
    freeze_last_layer(model)
    optimizer.step()
    for parameter, old in zip(last, before, strict=True):
        torch.testing.assert_close(parameter, old, rtol=0, atol=0)
        assert parameter not in optimizer.state
    assert all(p in optimizer.state for p in model.head.mlp.parameters())


# SGD and LARS, by an independent slow version: one number after the other, as the papers have it


def slow_steps(
    name: str, weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], rates: list[tuple[float, float]]
) -> dict[str, Tensor]:
    """Weights after steps of (lr, weight decay) with the reference's momentum and trust; a missing gradient rests."""
    lists = {key: weight.flatten().tolist() for key, weight in weights.items()}
    momenta = {key: [0.0] * len(numbers) for key, numbers in lists.items()}
    for step, (lr, weight_decay) in zip(gradients, rates, strict=True):
        for key, gradient in step.items():
            plain = key.endswith(".bias") or weights[key].ndim == 1
            decay = 0.0 if plain else weight_decay
            update = [g + decay * w for g, w in zip(gradient.flatten().tolist(), lists[key], strict=True)]
            if name == "lars" and weights[key].ndim != 1:
                norm, update_norm = (math.sqrt(sum(x * x for x in numbers)) for numbers in (lists[key], update))
                trust = 0.001 * norm / update_norm if norm > 0 and update_norm > 0 else 1.0
                update = [trust * u for u in update]
            momenta[key] = [0.9 * m + u for m, u in zip(momenta[key], update, strict=True)]
            lists[key] = [w - lr * m for w, m in zip(lists[key], momenta[key], strict=True)]
    return {key: torch.tensor(lists[key], dtype=torch.float64).view_as(weight) for key, weight in weights.items()}


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_sgd_and_lars_are_the_slow_versions(name: str) -> None:
    """Schedules that move, a layer that rests at first, a weight and a gradient of zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2)).double()
    nn.init.zeros_(model[3].weight)
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = [{key: torch.randn_like(weight) for key, weight in weights.items()} for _ in range(4)]
    del gradients[0]["2.weight"], gradients[1]["2.weight"]
    gradients[1]["3.weight"].zero_()
    rates = [(0.0, 0.1), (0.5, 0.2), (0.3, 0.0), (0.1, 0.4)]
    optimizer = build_optimizer(model, name)
    for step, (lr, weight_decay) in zip(gradients, rates, strict=True):
        for key, parameter in model.named_parameters():
            parameter.grad = step.get(key)
        set_schedule(optimizer, lr, weight_decay)
        optimizer.step()
    for key, expected in slow_steps(name, weights, gradients, rates).items():
        torch.testing.assert_close(dict(model.named_parameters())[key], expected, rtol=0, atol=1e-12, msg=key)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer is 'adam'; choose adamw, sgd or lars"):
        build_optimizer(nn.Linear(1, 1), "adam")
