"""Weights to start from: what is in a file comes over exactly, what does not fit is named, and no file runs code."""

import argparse
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from tiny import SETTINGS, digits, write_table
from torch import Tensor

from dino.backbones import build_backbone, seeded_backbone
from dino.checkpoint import BACKBONE_FORMAT, save_tensors
from dino.config import RANDOM_WEIGHTS, PretrainConfig
from dino.distributed import World
from dino.initial import initial_state
from dino.model import DINO
from dino.networks import backbone_arch, build_dino
from dino.pretrain import pretrain
from dino.training_state import TrainingState, save_state
from dino.vision_transformer import VisionTransformer, vit_small
from dino.weights import digest, fitting_backbone, read_weights, untrained_backbone

CONFIG = PretrainConfig(**SETTINGS)
ALONE = World(0, 1, torch.device("cpu"))
ARGS = argparse.Namespace(arch="vit_small", lr=0.0005, global_crops_scale=(0.4, 1.0), dist_url="env://", use_fp16=True)


def other_dino(config: PretrainConfig = CONFIG) -> DINO:
    """Networks whose student, teacher and seed are all different."""
    dino = build_dino(replace(config, seed=7), channels=3)
    with torch.no_grad():
        for parameter in dino.teacher.parameters():
            parameter.add_(0.125)
    return dino


def write_official(path: Path, dino: DINO, module: bool = True) -> Path:
    """The layout of main_dino.py: the student in DistributedDataParallel, the teacher in it with BatchNorm only."""
    optimizer = torch.optim.AdamW(dino.student.parameters())
    content = {
        "student": {f"module.{name}": tensor for name, tensor in dino.student.state_dict().items()},
        "teacher": {f"{'module.' * module}{name}": tensor for name, tensor in dino.teacher.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": ARGS,
        "dino_loss": {"center": torch.full((1, CONFIG.out_dim), 0.25)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }
    torch.save(content, path)
    return path


def started(path: Path, config: PretrainConfig = CONFIG) -> tuple[TrainingState, str]:
    return initial_state(replace(config, initial_weights=str(path)), channels=3)


def part(state: TrainingState, name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in state.tensors.items() if key.startswith(f"{name}.")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# What is in a file


@pytest.mark.parametrize("module", [True, False])
def test_an_official_full_checkpoint_continues_student_teacher_heads_and_centre(module: bool, tmp_path: Path) -> None:
    dino = other_dino()
    state, said = started(write_official(tmp_path / "checkpoint.pth", dino, module))
    assert_same(part(state, "student"), dict(dino.student.state_dict()))
    assert_same(part(state, "teacher"), dict(dino.teacher.state_dict()))
    assert state.tensors["center"].unique().tolist() == [0.25]
    assert (state.step, state.curve) == (0, []) and not part(state, "optimizer")
    assert said == f"backbones and heads from {tmp_path / 'checkpoint.pth'}, and the centre"


def test_an_official_backbone_starts_both_and_heads_are_the_seeds(tmp_path: Path) -> None:
    dino = other_dino()
    torch.save(dino.teacher.backbone.state_dict(), tmp_path / "dino_pretrain.pth")
    state, said = started(tmp_path / "dino_pretrain.pth")
    expected = {f"backbone.{name}": t for name, t in dino.teacher.backbone.state_dict().items()}
    expected |= {f"head.{name}": t for name, t in build_dino(CONFIG, 3).student.head.state_dict().items()}
    assert_same(part(state, "student"), expected)
    assert_same(part(state, "teacher"), expected)
    assert said.endswith("heads random (the file has none)")


def test_heads_of_another_size_stay_random_and_it_is_said(tmp_path: Path) -> None:
    dino = other_dino()
    config = replace(CONFIG, out_dim=48)
    state, said = started(write_official(tmp_path / "checkpoint.pth", dino), config)
    assert said.endswith("heads random (the file's do not fit: last_layer.weight_g is [32, 1] there, [48, 1] here)")
    assert torch.equal(state.tensors["student.backbone.pos_embed"], dino.student.backbone.pos_embed)
    assert torch.equal(state.tensors["teacher.backbone.pos_embed"], dino.teacher.backbone.pos_embed)
    seeded = build_dino(config, 3).student.head.state_dict()
    assert_same({k.removeprefix("head."): t for k, t in part(state, "teacher").items() if "head." in k}, dict(seeded))
    assert not state.tensors["center"].any()


def test_our_own_files_are_taken(tmp_path: Path) -> None:
    dino = other_dino()
    tensors = {f"student.{name}": t for name, t in dino.student.state_dict().items()}
    tensors |= {f"teacher.{name}": t for name, t in dino.teacher.state_dict().items()}
    tensors |= {"center": torch.ones(1, CONFIG.out_dim), "loss_sum": torch.ones(()), "optimizer.step.x": torch.ones(())}
    save_state(tmp_path / "state.safetensors", TrainingState(9, tensors, [{"step": 1}]), {})
    state, _ = started(tmp_path / "state.safetensors")
    assert_same(part(state, "student"), dict(dino.student.state_dict()))
    assert_same(part(state, "teacher"), dict(dino.teacher.state_dict()))
    assert state.step == 0 and float(state.tensors["center"].sum()) == CONFIG.out_dim

    backbone = dict(dino.teacher.backbone.state_dict())
    save_tensors(tmp_path / "teacher.safetensors", backbone, {"format": BACKBONE_FORMAT})
    state, _ = started(tmp_path / "teacher.safetensors")
    assert_same(
        {k.removeprefix("backbone."): t for k, t in part(state, "teacher").items() if "head." not in k}, backbone
    )


def test_a_classifier_of_torchvision_or_timm_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    whole = torchvision.models.resnet50(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet50.pth")
    backbone = build_backbone({"family": "torchvision", "name": "resnet50", "in_chans": 3}).eval()
    backbone.load_state_dict(fitting_backbone(read_weights(tmp_path / "resnet50.pth").teacher, backbone, "file"))
    with torch.no_grad():
        assert torch.equal(whole.fc(backbone(images)), whole(images))

    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = VisionTransformer(embed_dim=192, num_heads=3).eval()
    ours.load_state_dict(fitting_backbone(read_weights(tmp_path / "model.safetensors").teacher, ours, "file"))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, 0]
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_a_state_dict_within_a_dictionary_is_found(name: str, tmp_path: Path) -> None:
    backbone = other_dino().teacher.backbone
    torch.save({name: backbone.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    assert_same(fitting_backbone(read_weights(tmp_path / "x.pth").teacher, backbone, "x"), dict(backbone.state_dict()))


# Position embeddings of another grid


def slow_bicubic(grid_GGD: Tensor, size: int) -> Tensor:
    """Keys' kernel with a = -.75, number by number; pixel centres at the reference's scale of (size + .1) / G."""
    G = len(grid_GGD)
    scale = G / (size + 0.1)

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def taps(place: int) -> list[tuple[int, float]]:
        at = scale * (place + 0.5) - 0.5
        first = math.floor(at) - 1
        return [(min(max(i, 0), G - 1), kernel(at - i)) for i in range(first, first + 4)]

    out = torch.zeros(size, size, grid_GGD.shape[2], dtype=grid_GGD.dtype)
    for row in range(size):
        for column in range(size):
            for i, weight_i in taps(row):
                for j, weight_j in taps(column):
                    out[row, column] += weight_i * weight_j * grid_GGD[i, j]
    return out


@pytest.mark.parametrize(("before", "after"), [(6, 4), (3, 5), (2, 7)])
def test_position_embeddings_are_resampled_as_the_model_does(before: int, after: int) -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    old, new = (VisionTransformer(img_size=4 * grid, **sizes).double().eval() for grid in (before, after))
    weights = {f"backbone.{name}": tensor for name, tensor in old.state_dict().items()}
    new.load_state_dict(fitting_backbone(weights, new, "file"))
    slow = slow_bicubic(old.pos_embed[0, 1:].reshape(before, before, 8).detach(), after)
    torch.testing.assert_close(new.pos_embed[0, 1:].reshape(after, after, 8), slow, rtol=0, atol=1e-12)
    assert torch.equal(new.pos_embed[0, 0], old.pos_embed[0, 0])
    images = torch.randn(2, 3, 4 * after, 4 * after, dtype=torch.float64)
    torch.testing.assert_close(new(images), old(images), rtol=0, atol=1e-12)  # the model resamples by itself


@pytest.mark.parametrize("before", [32, 64])
def test_position_embeddings_of_timm_are_resampled_as_timm_does(before: int) -> None:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    old = timm.create_model(name, img_size=before, num_classes=0, depth=1, dynamic_img_size=True).eval()
    new = timm.create_model(name, num_classes=0, depth=1, dynamic_img_size=True).eval()
    torch.nn.init.normal_(old.pos_embed)
    weights = {f"backbone.{name}": tensor for name, tensor in old.state_dict().items()}
    new.load_state_dict(fitting_backbone(weights, new, "file"))
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(new(images), old(images), rtol=0, atol=1e-5)


# What does not fit


def test_another_architecture_is_named_with_keys_and_the_likely_one(tmp_path: Path) -> None:
    torch.save(vit_small(patch_size=8, img_size=32).state_dict(), tmp_path / "vits.pth")
    with pytest.raises(ValueError) as error:
        started(tmp_path / "vits.pth")
    for words in (
        "vits.pth is of another network than pretrain.arch",
        "cls_token is [1, 1, 384] in the file, [1, 1, 16] here",
        "; and ",
        "It looks like vit_small, patch_size 8, for images of 3 channel(s)",
    ):
        assert words in str(error.value)
    torch.save(VisionTransformer(img_size=32, embed_dim=32, depth=3, num_heads=2).state_dict(), tmp_path / "own.pth")
    with pytest.raises(
        ValueError, match=r"blocks\.2\.\S+ is in the file only.* a ViT of embed_dim 32, depth 3, patch_size 16"
    ):
        fitting_backbone(
            read_weights(tmp_path / "own.pth").teacher,
            VisionTransformer(img_size=32, embed_dim=32, depth=2, num_heads=2),
            "own.pth",
        )


def test_a_convnet_for_a_vit_is_recognised(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r.pth")
    with pytest.raises(ValueError, match=r"cls_token is not in the file.*It looks like resnet18"):
        started(tmp_path / "r.pth")
    torch.save({"encoder.weight": torch.ones(3)}, tmp_path / "e.pth")
    with pytest.raises(ValueError, match="Which network it is of was not recognised"):
        started(tmp_path / "e.pth")


def test_images_of_other_channels_are_named(tmp_path: Path) -> None:
    torch.save(other_dino().teacher.backbone.state_dict(), tmp_path / "rgb.pth")
    with pytest.raises(
        ValueError, match=r"patch_embed\.proj\.weight is \[16, 3, 4, 4\] in the file, \[16, 1, 4, 4\] here"
    ):
        initial_state(replace(CONFIG, initial_weights=str(tmp_path / "rgb.pth")), channels=1)


# Files that are not whole, not weights, or hostile


class RunsCode:
    """A pickle that leaves a trace if it is ever loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_hostile_file_is_refused_and_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"student": {"module.x": torch.ones(1)}, "args": RunsCode(trace)}, tmp_path / "new.pth")
    torch.save({"x": RunsCode(trace)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"x": RunsCode(trace)}))
    hidden = argparse.Namespace(arch="vit_small", more=RunsCode(trace))  # within the settings that are let pass
    torch.save({"teacher": {"backbone.x": torch.ones(1)}, "args": hidden}, tmp_path / "hidden.pth")
    for path in tmp_path.glob("*.pth"):
        with pytest.raises(
            ValueError, match=rf"{path.name} is no file of plain weights: .* could run code \(none was run\)$"
        ):
            read_weights(path)
        assert not trace.exists()
    with pytest.raises(AssertionError):  # the trap does snap
        pickle.loads((tmp_path / "plain.pth").read_bytes())
        assert not trace.exists()


def test_a_namespace_is_let_pass_for_this_reading_only(tmp_path: Path) -> None:
    path = write_official(tmp_path / "checkpoint.pth", other_dino())
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
            torch.load(path, weights_only=True)
        read_weights(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["full.pth", "old.pth", "foreign.safetensors", "ours.safetensors"])
def test_a_truncated_file_is_refused_in_one_line(kind: str, share: float, tmp_path: Path) -> None:
    path, dino = tmp_path / kind, other_dino()
    backbone = dict(dino.teacher.backbone.state_dict())
    if kind == "full.pth":
        write_official(path, dino)
    elif kind == "old.pth":
        torch.save(backbone, path, _use_new_zipfile_serialization=False)
    elif kind == "foreign.safetensors":
        save_file(backbone, path)
    else:
        save_tensors(path, backbone, {"format": BACKBONE_FORMAT})
    assert read_weights(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{path.name} (is empty: its download was cut short|is no )") as error:
        read_weights(path)
    assert len(str(error.value).splitlines()) == 1


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.pth").write_bytes(digits(1)[0])
    (tmp_path / "text.pth").write_text("<html>404 not found</html>")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for path in tmp_path.glob("*.pth"):
        with pytest.raises(ValueError, match=rf"{path.name} (is no file of |holds no weights)"):
            read_weights(path)
    with pytest.raises(ValueError, match=r"initial_weights is '/none\.pth': there is no such file"):
        digest("/none.pth")
    with pytest.raises(ValueError, match="there is no such file"):
        digest(tmp_path)


# Trainings and what they began with


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory):
    return write_table(tmp_path_factory.mktemp("tiny") / "train.arrow")


def test_a_training_begins_with_the_weights_and_resumes_without_the_file(table, tmp_path: Path) -> None:
    path = write_official(tmp_path / "checkpoint.pth", other_dino())
    config = replace(CONFIG, initial_weights=str(path), epochs=1, teacher_temp_warmup_epochs=0)
    words, saved = [], []
    final = pretrain(
        config,
        table,
        world=ALONE,
        precision=torch.float32,
        say=words.append,
        save=saved.append,
        should_save=lambda: True,
    )
    assert words == [f"begins with backbones and heads from {path}, and the centre"]
    from_state = pretrain(config, table, world=ALONE, precision=torch.float32, state=initial_state(config, 3)[0])
    assert_same(final.tensors, from_state.tensors)
    random = pretrain(replace(config, initial_weights=RANDOM_WEIGHTS), table, world=ALONE, precision=torch.float32)
    assert not torch.equal(random.tensors["teacher.backbone.pos_embed"], final.tensors["teacher.backbone.pos_embed"])
    path.unlink()
    words.clear()
    resumed = pretrain(config, table, world=ALONE, precision=torch.float32, state=saved[2], say=words.append)
    assert_same(resumed.tensors, final.tensors)
    assert words == []


def test_the_untrained_backbone_is_the_teacher_that_the_training_began_with(tmp_path: Path) -> None:
    dino = other_dino()
    path = write_official(tmp_path / "checkpoint.pth", dino)
    arch = backbone_arch(CONFIG, 3)
    facts = {"arch": arch, "seed": 0, "initial_weights_md5": digest(path), "params": {"initial_weights": str(path)}}
    untrained = untrained_backbone(facts)
    assert not untrained.training
    assert_same(dict(untrained.state_dict()), dict(dino.teacher.backbone.state_dict()))
    write_official(path, build_dino(CONFIG, 3))
    with pytest.raises(ValueError, match=r"checkpoint\.pth has changed since the training that began with it"):
        untrained_backbone(facts)
    assert digest(RANDOM_WEIGHTS) is None
    seeded = untrained_backbone({**facts, "initial_weights_md5": None})
    assert_same(dict(seeded.state_dict()), dict(seeded_backbone(arch, 0).state_dict()))
