"""Exports: what other tools read is the same network, and a file that is not right never appears."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import ARCH, pixels, write_checkpoint

import dino
from dino.export import OPSET, export_onnx, export_safetensors, export_timm, export_torchvision
from dino.pretrained import Pretrained

CLOSE = {"rtol": 0, "atol": 1e-5}
CONVNET = {"family": "torchvision", "name": "resnet18", "embed_dim": 512}
PHOTOS = [pixels(20, 30), pixels(40, 13), pixels(12, 12), pixels(9, 9), pixels(15, 64)]


def trained(tmp_path: Path, **facts: Any) -> Pretrained:
    return dino.load(write_checkpoint(tmp_path / "teacher.safetensors", **facts))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return trained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(model: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "teacher.onnx"
    done = export_onnx(model, path)
    assert 0 < done.difference < 1e-5
    return path


def run(file: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_onnx_gives_torchs_features_of_pixels_for_any_batch(model: Pretrained, file: Path, batch: int) -> None:
    assert torch.allclose(run(file, model.transform.crops(PHOTOS[:batch])), model(PHOTOS[:batch]), **CLOSE)


def test_onnx_says_what_it_takes(file: Path) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["N", 3, 12, 12])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("features", ["N", 16])]
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["key"] == "0123456789abcdef" and json.loads(facts["mean"]) == [0.2, 0.25, 0.3]
    assert (facts["resize_px"], facts["crop_px"], facts["channels"]) == ("14", "12", "3")
    assert "RGB" in facts["images"] and "14 px" in facts["images"]
    content = onnx.load(file)
    onnx.checker.check_model(content, full_check=True)
    assert [(opset.domain, opset.version) for opset in content.opset_import] == [("", OPSET)]


def test_onnx_of_grey_images_at_another_size(tmp_path: Path) -> None:
    grey = trained(tmp_path, channels=1, arch=ARCH | {"depth": 1})  # seconds a block
    file = tmp_path / "a" / "grey.onnx"
    assert export_onnx(grey, file, size_px=20).size_px == 20
    images = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(3))
    expected = grey.features((images - 0.2) / 0.3)
    assert torch.allclose(run(file, images), expected, **CLOSE)
    assert str(Path(dino.__file__).parent).encode() not in file.read_bytes(), "a path of this machine"


@pytest.fixture(scope="module")
def small(model: Pretrained) -> Pretrained:
    """Written in two seconds; its running statistics are no longer those of the beginning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
        network = torch.nn.Sequential(*layers, torch.nn.Flatten())
        network(torch.randn(8, 3, 32, 32))
    return Pretrained(network.eval(), model.transform, model.facts | {"arch": CONVNET})


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """Its running statistics are no longer those of the beginning."""
    model = trained(tmp_path_factory.mktemp("convnet"), arch=CONVNET)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model.backbone.train()(torch.randn(8, 3, 32, 32))
    model.backbone.eval()
    return model


@pytest.mark.parametrize("name", ["small", pytest.param("convnet", marks=pytest.mark.acceptance)])
def test_convnets_as_onnx_and_the_same_bytes_again(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    convnet: Pretrained = request.getfixturevalue(name)
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for file in (first, second):
        export_onnx(convnet, file, size_px=32)
    assert first.read_bytes() == second.read_bytes()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.2, 0.25, 0.3], [0.3, 0.2, 0.25]))
    expected = convnet.features((images - mean) / std)
    assert torch.allclose(run(first, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.acceptance
def test_a_vit_as_onnx_is_the_same_bytes_again(model: Pretrained, file: Path, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "export", [export_timm, export_safetensors, pytest.param(export_onnx, marks=pytest.mark.acceptance)]
)
def test_a_file_that_is_not_right_does_not_appear(export: Any, tmp_path: Path) -> None:
    broken = trained(tmp_path)
    with torch.no_grad():
        broken.backbone.norm.bias[3] = torch.nan  # type: ignore[union-attr, index]
    out = tmp_path / "out" / "file"
    with pytest.raises(ValueError, match="read back, its features differ by nan"):
        export(broken, out)
    assert list(out.parent.iterdir()) == []
    out.write_text("older")
    with pytest.raises(ValueError, match="not written"):
        export(broken, out)
    assert out.read_text() == "older"


def loaded(lines: str) -> torch.nn.Module:
    """The network that the printed lines make."""
    names: dict[str, Any] = {}
    exec(lines, names)
    return names["network"].eval()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size_px", [None, 20])
@pytest.mark.parametrize("export", [export_timm, export_safetensors])
def test_the_printed_lines_load_weights_that_give_the_same_features(
    export: Any, size_px: int | None, channels: int, tmp_path: Path
) -> None:
    ours = trained(tmp_path, channels=channels)
    done = export(ours, tmp_path / "weights.safetensors", size_px=size_px)
    assert done.size_px == (size_px or 12)
    images = torch.randn(4, channels, done.size_px, done.size_px, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.allclose(loaded(done.load)(images), ours.features(images), **CLOSE)


def test_a_network_of_a_named_size_is_timms_of_that_name(tmp_path: Path) -> None:
    ours = trained(tmp_path)
    named = torch.nn.Module.__new__(type(ours.backbone))
    type(ours.backbone).__init__(named, img_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3)
    whole = Pretrained(named.eval(), ours.transform, ours.facts)
    done = export_timm(whole, tmp_path / "w", size_px=32)
    assert 'timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)' in done.load


def test_weights_keep_the_official_names(model: Pretrained, tmp_path: Path) -> None:
    export_safetensors(model, tmp_path / "w.safetensors", size_px=20)
    weights = load_file(tmp_path / "w.safetensors")
    assert {"cls_token", "pos_embed", "blocks.1.attn.qkv.weight", "norm.bias"} <= set(weights)
    assert weights["pos_embed"].shape == (1, 26, 16)


def test_what_cannot_be_is_refused_with_the_cure(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="18 px does not divide into patches of 4 px; choose 16 or 20"):
        export_timm(model, tmp_path / "x", size_px=18)
    with pytest.raises(ValueError, match=r"torchvision has no such network.*choose --to timm"):
        export_torchvision(model, tmp_path / "x")
    for missing, export in (("timm", export_timm), ("onnxruntime", export_onnx), ("onnxscript", export_onnx)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)  # as where it is not installed
            with pytest.raises(ValueError, match=f"pip install {missing}"):
                export(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_exports_leave_torchs_generator_and_the_model_alone(model: Pretrained, tmp_path: Path) -> None:
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in model.backbone.state_dict().items()}
    export_timm(model, tmp_path / "w", size_px=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.backbone.state_dict().items())
    assert np.isfinite(model(PHOTOS).numpy()).all()


@pytest.mark.parametrize("export", [export_torchvision, export_timm, export_safetensors])
def test_convnets_by_the_names_of_those_who_have_them(convnet: Pretrained, export: Any, tmp_path: Path) -> None:
    done = export(convnet, tmp_path / "w", size_px=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.allclose(loaded(done.load)(images), convnet.features(images), rtol=1e-4, atol=1e-4)


def test_a_convnet_that_timm_lacks_or_torchvision_has_with_other_channels(tmp_path: Path) -> None:
    shuffle = trained(tmp_path, arch={"family": "torchvision", "name": "shufflenet_v2_x0_5", "embed_dim": 1024})
    with pytest.raises(ValueError, match="timm has no shufflenet_v2_x0_5; choose --to onnx"):
        export_timm(shuffle, tmp_path / "x")
    grey = trained(tmp_path, arch=CONVNET, channels=1)
    with pytest.raises(ValueError, match=r"resnet18 takes 3 channels, this one 1; choose --to timm"):
        export_torchvision(grey, tmp_path / "x")
    assert not (tmp_path / "x").exists()
