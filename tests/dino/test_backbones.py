"""Backbones by name: every family gives pooled features of every crop size, from seeded draws only."""

import sys
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from dino.backbones import build_backbone, feature_width, named_arch, seeded_backbone
from dino.config import TORCHVISION, PretrainConfig
from dino.networks import backbone_arch, build_dino
from dino.vision_transformer import VisionTransformer, vit_tiny

SMALL = {"out_dim": 16, "hidden_dim": 8, "bottleneck_dim": 8, "drop_path_rate": 0.0}
# one of each kind: plain, depthwise with dropout, layer norm with stochastic depth, windows
KINDS = ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t", "regnet_y_400mf"]


def test_the_list_of_names_is_torchvisions_but_for_those_of_one_size_or_of_no_pooled_features() -> None:
    offered = set(torchvision.models.list_models(module=torchvision.models))
    fixed_size = {"maxvit_t", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"}
    auxiliary_outputs, hidden_layers_behind = {"googlenet", "inception_v3"}, {"alexnet"}
    hidden_layers_behind |= {name for name in offered if name.startswith(("vgg", "squeezenet"))}
    assert set(TORCHVISION) == offered - fixed_size - auxiliary_outputs - hidden_layers_behind
    assert len(set(TORCHVISION)) == len(TORCHVISION)


@pytest.mark.parametrize(
    ("channels", "name"),
    [
        pytest.param(channels, name, marks=[] if kind % 3 == place else pytest.mark.acceptance)  # each kind once
        for kind, name in enumerate(KINDS)
        for place, channels in enumerate([1, 3, 5])
    ],
)
def test_a_name_of_torchvision_is_a_network_without_its_classifier(name: str, channels: int) -> None:
    arch = named_arch(name, channels, [64, 32])
    backbone = seeded_backbone(arch, 0)
    assert backbone(torch.zeros(2, channels, 32, 32)).shape == (2, arch["embed_dim"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torchvision.models.get_model(name, weights=None)
    *_, (classifier, _) = ((path, m) for path, m in whole.named_modules() if isinstance(m, nn.Linear))
    expected = {key for key in whole.state_dict() if not key.startswith(f"{classifier}.")}
    assert set(backbone.state_dict()) == expected


def test_features_are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(weights=None).eval()
    backbone = build_backbone({"family": "torchvision", "name": "resnet18", "in_chans": 3}).eval()
    assert backbone.load_state_dict(whole.state_dict(), strict=False).unexpected_keys == ["fc.weight", "fc.bias"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(images)
        assert torch.equal(whole.fc(features), whole(images))


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny", "timm/convnext_atto"])
def test_no_layer_draws_at_random_in_training(name: str) -> None:
    """Draws of the global generator would differ after a resumption, and between numbers of ranks."""
    backbone = seeded_backbone(named_arch(name, 3, [32]), 0).train()
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = backbone(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(backbone(images), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
def test_student_and_teacher_begin_alike_from_the_seed_alone(name: str) -> None:
    config = PretrainConfig(arch=name, **SMALL, global_px=64, local_px=32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    dino = build_dino(config, channels=1)
    assert torch.equal(torch.get_rng_state(), before)
    expected = seeded_backbone(backbone_arch(config, 1), config.seed).state_dict()
    for network in (dino.student.backbone, dino.teacher.backbone):
        assert network.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())
    student_out, teacher_out = dino([torch.randn(2, 1, px, px) for px in (64, 64, 32, 32)])
    assert (student_out.shape, teacher_out.shape) == ((8, 16), (4, 16))


def test_our_vit_takes_any_number_of_channels() -> None:
    for channels in (2, 4, 7):
        backbone = build_backbone({"family": "vit", "img_size": 8, "patch_size": 4, "in_chans": channels,
                                   "embed_dim": 8, "depth": 1, "num_heads": 2})  # fmt: skip
        assert backbone(torch.zeros(2, channels, 8, 8)).shape == (2, 8)


# timm's


def test_timms_vit_with_our_weights_is_ours() -> None:
    """An implementation by other people: tokens, attention, norms and their order, to rounding in float64."""
    torch.manual_seed(0)
    ours = vit_tiny(patch_size=16).double().eval()
    theirs = build_backbone({"family": "timm", "name": "vit_tiny_patch16_224", "in_chans": 3}).double().eval()
    for parameter in ours.parameters():  # no zero biases, no unit norms
        nn.init.normal_(parameter, std=0.05)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-10)


def test_timm_gives_crops_of_several_sizes_to_those_that_can() -> None:
    assert named_arch("timm/vit_tiny_patch16_224", 1, [64, 32]) == {
        "family": "timm", "name": "vit_tiny_patch16_224", "in_chans": 1, "embed_dim": 192,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"pretrain\.arch is 'timm/mixer_s32_224': .* does not take images of 64 x 64"):
        backbone_arch(PretrainConfig(arch="timm/mixer_s32_224", **SMALL, global_px=64, local_px=32), 3)


def test_an_unknown_name_of_timm_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'timm/resnet5': timm .* has no such network; did you mean timm/resnet50\?"):
        backbone_arch(PretrainConfig(arch="timm/resnet5", **SMALL), 3)
    assert timm.is_model("resnet50")


def test_timm_that_is_not_installed_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python makes of a package that is not there
    with pytest.raises(ValueError, match=r"'timm/resnet18': timm is not installed: pip install timm"):
        backbone_arch(PretrainConfig(arch="timm/resnet18", **SMALL), 3)


@pytest.mark.parametrize("arch", [None, [], {}, {"family": "vits"}, {"family": "torchvision"}])
def test_what_is_no_architecture_is_refused(arch: object) -> None:
    with pytest.raises(ValueError, match="is no architecture: its family is vit, torchvision or timm"):
        build_backbone(arch)  # type: ignore[arg-type]


def test_images_that_do_not_fit_are_refused() -> None:
    backbone = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2).eval()
    assert feature_width(backbone, 3, 12) == 8
    with pytest.raises(ValueError, match=r"does not take images of 10 x 10 pixels .*multiple of 4"):
        feature_width(backbone, 3, 10)
    with pytest.raises(ValueError, match="gives no pooled features"):
        feature_width(nn.Conv2d(3, 8, 1), 3, 4)
