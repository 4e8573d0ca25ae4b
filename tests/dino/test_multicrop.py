"""Crops of many resolutions: the reference's numbers, their order, and how often what is computed."""

import pytest
import torch
from torch import Tensor, nn

from dino.head import DINOHead
from dino.multicrop import MultiCropWrapper
from dino.vision_transformer import VisionTransformer


def wrapper(**settings) -> MultiCropWrapper:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, **settings)
    return MultiCropWrapper(backbone, DINOHead(16, 48, hidden_dim=40, bottleneck_dim=16))


def test_golden_multicrop(golden) -> None:
    reference = golden("multicrop")
    model = wrapper()
    model.load_state_dict(reference.under("w/"))
    with torch.no_grad():
        scores = model([reference[f"crop{i}"] for i in range(6)])
    torch.testing.assert_close(scores, reference["y"], rtol=0, atol=1e-5)


def crops_of(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, px, px, generator=generator, dtype=torch.float64) for px in sizes]


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [([16, 16, 8, 8, 8], 2), ([16, 16], 1), ([8, 16, 8], 3), ([8, 12, 12, 8, 8], 3)],
)
def test_scores_are_those_of_each_crop_alone_in_order(sizes: list[int], passes: int) -> None:
    model = wrapper().double()
    calls: list[nn.Module] = []
    for module in (model.backbone, model.head):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    crops = crops_of(sizes)
    together = model(crops)
    assert calls == [model.backbone] * passes + [model.head]
    alone = torch.cat([model(crop) for crop in crops])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_stochastic_depth_of_each_crop_is_its_own() -> None:
    model = wrapper(drop_path_rate=0.5).double().train()
    crops = crops_of([16, 16, 8, 8])
    generator = torch.Generator().manual_seed(2)
    draws = [torch.rand(2, 2, 3, generator=generator) for _ in crops]
    together = model(crops, draws)
    alone = torch.cat([model([crop], [uniform]) for crop, uniform in zip(crops, draws, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(together, model(crops, draws[::-1]))


def test_draws_for_some_crops_only_are_refused() -> None:
    with pytest.raises(ValueError):
        wrapper()(crops_of([8, 8]), [torch.rand(2, 2, 3)])
