"""The ViT against the reference's numbers, and its shortcuts against the long way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino import vision_transformer
from dino.vision_transformer import VisionTransformer, vit_base, vit_small, vit_tiny

SIZES = ["full", "small", "wide", "large"]


def small_vit(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    model = VisionTransformer(**{**sizes, **settings})
    return jumbled(model).double()


def jumbled(model: nn.Module) -> nn.Module:
    """With weights far from the initial ones, so that biases, norms and CLS all show in the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def images(count: int, height: int, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, height, width or height, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_golden_vit(golden, size: str) -> None:
    reference = golden("vit")
    config = reference.config
    assert config.pop("norm_eps") == vision_transformer.NORM_EPS
    model = VisionTransformer(**config)
    model.load_state_dict(reference.under("w/"))
    image = reference[f"in/{size}"]
    close = {"rtol": 0, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(model(image), reference[f"cls/{size}"], **close)
        attention = model.get_last_selfattention(image)
        torch.testing.assert_close(attention, reference[f"attention/{size}"], **close)
        layers = model.get_intermediate_layers(image, 2)
        for i, tokens in enumerate(layers):
            torch.testing.assert_close(tokens, reference[f"layer{i}/{size}"], **close)
        assert len(layers) == 2
        torch.testing.assert_close(model.get_intermediate_layers(image)[0], layers[-1])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 24), (8, 20), (28, 12), (16, 4)])
def test_position_embedding_is_the_references_interpolation(height: int, width: int) -> None:
    model = small_vit()
    grid = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    rows, columns = height // 4, width // 4
    expected = F.interpolate(grid, scale_factor=((rows + 0.1) / 4, (columns + 0.1) / 4), mode="bicubic")
    expected = torch.cat([model.pos_embed[:, :1], expected.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(model.position_embedding(height, width), expected, rtol=0, atol=1e-12)


def test_position_embedding_of_its_own_grid_is_left_alone() -> None:
    model = small_vit()
    assert model.position_embedding(16, 16) is model.pos_embed
    # as many patches, another shape: the count alone decides nothing
    assert not torch.allclose(model.position_embedding(8, 32), model.pos_embed)


def test_evaluation_in_inference_mode_leaves_training_possible() -> None:
    model = small_vit()
    vision_transformer.position_resampling.cache_clear()
    with torch.inference_mode():
        model(images(1, 12))
    remembered = vision_transformer.position_resampling(4, 3, 3, torch.float64, model.pos_embed.device)
    assert not remembered.is_inference()
    model(images(1, 12)).sum().backward()
    assert model.pos_embed.grad is not None


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 12)])
def test_only_the_cls_row_is_computed_and_it_is_the_full_one(height: int, width: int) -> None:
    model = small_vit()
    batch = images(3, height, width)
    short = model(batch)
    long = model.get_intermediate_layers(batch, 1)[0][:, 0]
    torch.testing.assert_close(short, long, rtol=0, atol=1e-12)
    weights = torch.randn(short.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((short * weights).sum(), list(model.parameters())),
        torch.autograd.grad((long * weights).sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_fused_and_explicit_attention_agree(monkeypatch) -> None:
    model = small_vit(qkv_bias=True)
    batch = images(2, 48)  # 145 tokens: fused by default
    assert vision_transformer.SDPA_MIN_TOKENS <= (48 // 4) ** 2 + 1
    fused = model(batch)
    monkeypatch.setattr(vision_transformer, "SDPA_MIN_TOKENS", 10**9)
    torch.testing.assert_close(model(batch), fused, rtol=0, atol=1e-11)


def masked_forward(model: VisionTransformer, batch: Tensor, uniform_L2N: Tensor) -> Tensor:
    """Stochastic depth as the reference writes it: every branch computed, divided by keep, masked."""
    x = model.tokens(batch)
    for layer, block in enumerate(model.blocks):
        keep = 1 - block.drop_path_rate
        mask = torch.floor(keep + uniform_L2N[layer])[:, :, None, None]
        x = x + block.attn(block.norm1(x), x.shape[1]) / keep * mask[0]
        x = x + block.mlp(block.norm2(x)) / keep * mask[1]
    return model.norm(x)[:, 0]


def test_dropped_branches_equal_masked_ones() -> None:
    model = small_vit(drop_path_rate=0.6).train()
    batch = images(16, 12)
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(4, 2, 16, generator=generator, dtype=torch.float64)
    uniform[2, 0] = 0.0  # a branch that no image keeps
    uniform[3, 1] = 0.99  # and one that all keep
    short, long = model(batch, uniform), masked_forward(model, batch, uniform)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-11)
    assert not torch.allclose(short, model.eval()(batch))
    weights = torch.randn(short.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((short * weights).sum(), list(model.parameters())),
        torch.autograd.grad((long * weights).sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_stochastic_depth_rises_linearly_and_acts_in_train_mode_only() -> None:
    model = small_vit(drop_path_rate=0.3)
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    batch = images(8, 16)
    model.train()
    torch.manual_seed(5)
    first = model(batch)
    torch.manual_seed(5)
    torch.testing.assert_close(model(batch), first, rtol=0, atol=0)
    assert not torch.allclose(model(batch), first)
    model.eval()
    torch.testing.assert_close(model(batch), model(batch), rtol=0, atol=0)
    without = small_vit(drop_path_rate=0.0)
    torch.testing.assert_close(model(batch), without.train()(batch), rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_share_of_dropped_branches(rate: float) -> None:
    torch.manual_seed(0)
    block = small_vit(drop_path_rate=rate, depth=2).blocks[1]
    x = torch.randn(20_000, 1, 24, dtype=torch.float64)
    block.attn.proj.weight.data.zero_()
    block.attn.proj.bias.data.fill_(1.0)
    block.mlp.fc2.weight.data.zero_()
    block.mlp.fc2.bias.data.fill_(3.0)
    added = block(x, 1, torch.rand(2, 20_000)) - x
    branches = (added[:, 0, 0] * (1 - rate)).round().long()  # 0: none, 1: attention, 3: MLP, 4: both
    shares = torch.bincount(branches, minlength=5) / 20_000
    expected = [rate**2, rate * (1 - rate), 0, rate * (1 - rate), (1 - rate) ** 2]
    assert shares.tolist() == pytest.approx(expected, abs=0.015)  # four standard deviations


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = vit_tiny(patch_size=16, depth=2)
    for name, parameter in model.named_parameters():
        if name in ("pos_embed", "cls_token") or (name.endswith("weight") and parameter.ndim == 2):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15 if name == "cls_token" else 0.03), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name != "patch_embed.proj.bias" and name.endswith("bias"):
            assert (parameter == 0).all(), name
    # the patch convolution keeps torch's: uniform within 1 / sqrt(fan in)
    bound = (3 * 16 * 16) ** -0.5
    convolution = model.patch_embed.proj.weight
    assert convolution.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert convolution.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert model.patch_embed.proj.bias.abs().max() > 0


def test_initial_weights_for_narrow_networks() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=4, embed_dim=64, depth=2, num_heads=2, init_std=None, position_std=0.3
    )
    for name, parameter in model.named_parameters():
        if name.startswith("blocks") and parameter.ndim == 2:
            # the truncation at 2, not at 2 standard deviations, cuts nothing
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.03), name
    assert model.pos_embed.std().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize(
    ("make", "patch", "heads", "parameters"),
    [(vit_tiny, 16, 3, 5_524_416), (vit_small, 16, 6, 21_665_664), (vit_small, 8, 6, 21_670_272)],
)
def test_named_sizes_are_the_published_ones(make, patch: int, heads: int, parameters: int) -> None:
    model = make(patch_size=patch)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [block.attn.num_heads for block in model.blocks] == [heads] * 12


def test_settings_override_a_named_size() -> None:
    model = vit_base(patch_size=4, img_size=8, in_chans=1, embed_dim=8, depth=2, num_heads=2)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 8)
    assert model.arch == {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "init_std": 0.02,
        "position_std": 0.02,
    }
    again = VisionTransformer(**model.arch)
    again.load_state_dict(model.state_dict())


def test_initial_weights_of_a_narrow_network_keep_the_scale_of_their_input() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=4, embed_dim=64, depth=2, num_heads=2, init_std=None, position_std=0.5
    )
    for layer in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.1)


def test_without_qkv_bias() -> None:
    model = small_vit(qkv_bias=False)
    assert all(block.attn.qkv.bias is None for block in model.blocks)
    batch = images(2, 8)
    long = model.get_intermediate_layers(batch, 1)[0][:, 0]
    torch.testing.assert_close(model(batch), long, rtol=0, atol=1e-12)


def test_attention_rows_sum_to_one() -> None:
    attention = small_vit().get_last_selfattention(images(2, 8, 12))
    assert attention.shape == (2, 3, 7, 7)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embed_dim": 10, "num_heads": 3}, ["num_heads (3)", "embed_dim (10)"]),
        ({"img_size": 30, "patch_size": 16}, ["patch_size (16)", "img_size (30)"]),
    ],
)
def test_impossible_sizes_are_named(settings, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        VisionTransformer(**settings)
    assert all(word in str(error.value) for word in words)


def test_an_image_that_does_not_divide_into_patches_is_named() -> None:
    with pytest.raises(ValueError, match=r"8 x 10 pixels .* multiple of 4"):
        small_vit()(images(1, 8, 10))
