"""Checkpoints: the same content is the same bytes, and what is not whole, not ours or altered is refused in words."""

import dataclasses
import hashlib
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import SETTINGS

from dino.backbones import seeded_backbone
from dino.checkpoint import (
    BACKBONE_FORMAT,
    load_backbone,
    load_tensors,
    save_tensors,
)
from dino.config import PretrainConfig
from dino.distributed import World
from dino.networks import backbone_arch, build_dino
from dino.training_state import TrainingState, load_state, save_state
from dino.vision_transformer import VisionTransformer
from dino.weights import untrained_backbone

CONFIG = PretrainConfig(**{**SETTINGS, "drop_path_rate": 0.0})
ARCH = backbone_arch(CONFIG, channels=3)
CURVE = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-7}]


def tensors() -> dict[str, torch.Tensor]:
    numbers = torch.arange(6, dtype=torch.float32)
    return {
        "b": numbers.reshape(2, 3) / 7,
        "a.scalar": torch.tensor(-0.0),
        "halves": numbers.bfloat16(),
        "doubles": numbers.double() / 3,
        "counts": numbers.long(),
        "transposed": numbers.reshape(2, 3).T,
        "none": torch.zeros(0, 4),
    }


def facts() -> dict[str, Any]:
    return {"name": "Ünïcode", "mean": [0.1, 0.2], "nested": {"z": 1, "a": None}, "pair": (1, 2)}


def write_own(world: World, folder: Path) -> None:
    """In a process of another hash seed."""
    save_tensors(folder / f"{world.rank}.safetensors", tensors(), facts())


def write_backbone(path: Path, **changed: Any) -> Path:
    content = {"format": BACKBONE_FORMAT, "arch": ARCH, "seed": CONFIG.seed} | changed
    save_tensors(path, seeded_backbone(ARCH, 5).state_dict(), content)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "c.safetensors"
    save_tensors(path, tensors(), facts())
    found, found_facts = load_tensors(path)
    assert found_facts == facts() | {"pair": [1, 2]}  # JSON's own
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_content_is_the_same_bytes_in_another_process_and_under_another_name(
    tmp_path: Path, on_two_ranks
) -> None:
    save_tensors(tmp_path / "one.safetensors", tensors(), facts())
    backwards = dict(reversed(tensors().items())), dict(reversed(facts().items()))
    save_tensors(tmp_path / "two.safetensors", *backwards)
    on_two_ranks(write_own, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert len({hashlib.md5(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}) == 1


def test_other_content_is_other_bytes(tmp_path: Path) -> None:
    path, seen = tmp_path / "c.safetensors", set()
    for changed, more in (({}, {}), ({"b": torch.zeros(2, 3)}, {}), ({}, {"mean": [0.1, 0.3]})):
        save_tensors(path, tensors() | changed, facts() | more)
        seen.add(path.read_bytes())
    assert len(seen) == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_tensors(path, tensors(), facts())
    before = path.read_bytes()
    with pytest.raises(ValueError):
        save_tensors(path, tensors(), {"loss": float("nan")})
    with pytest.raises(RuntimeError):
        save_tensors(path, {"a": (shared := torch.zeros(3)), "b": shared}, facts())  # safetensors' own refusal
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Not whole, not ours, altered


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "c.safetensors"
    save_tensors(path, tensors(), facts())
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(share: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"short\.safetensors is no checkpoint of this project, or it is cut short"):
        load_tensors(path)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_an_altered_file_is_refused_or_says_the_same(
    place: float, bit: int, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Letters of a hexadecimal escape or an exponent may change their case: nothing else may pass."""
    path = tmp_path_factory.getbasetemp() / "altered.safetensors"
    content = bytearray(whole)
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found, found_facts = load_tensors(path)
    except ValueError as error:
        assert "altered.safetensors" in str(error)
        return
    assert found_facts == facts() | {"pair": [1, 2]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize(
    ("old", "new"), [(b'\\"mean\\": [0.1,', b'\\"mean\\": [0.7,'), (b'"F32","shape":[2,3]', b'"I32","shape":[2,3]')]
)
def test_an_altered_header_is_refused(old: bytes, new: bytes, whole: bytes, tmp_path: Path) -> None:
    """One that still parses, with other facts or another type in it."""
    assert old in whole
    path = tmp_path / "c.safetensors"
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ValueError, match="altered or damaged"):
        load_tensors(path)


class RunsCode:
    """A pickle that leaves a trace if it is ever loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def foreign_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.safetensors" for name in ("picture", "pickle", "torch", "strange", "list", "deep")}
    files["picture"].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    files["pickle"].write_bytes(pickle.dumps(RunsCode(folder / "ran")))
    torch.save({"weights": torch.zeros(3), "code": RunsCode(folder / "ran")}, files["torch"])
    save_file({"a": torch.zeros(3)}, files["strange"], metadata={"format": "pt"})
    save_file({"a": torch.zeros(3)}, files["list"], metadata={"dino": "[1, 2]"})
    save_file({"a": torch.zeros(3)}, files["deep"], metadata={"dino": "[" * 100_000})
    return files


@pytest.mark.parametrize("load", [load_tensors, load_backbone, load_state])
def test_a_foreign_file_is_refused_and_runs_no_code(load: Any, tmp_path: Path) -> None:
    for path in foreign_files(tmp_path).values():
        with pytest.raises(ValueError, match=rf"{path.name} is no checkpoint of this project"):
            load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_tensors, load_backbone, load_state])
def test_a_missing_file_is_named_with_its_cure(load: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(
            ValueError, match=rf"no checkpoint at {path}; run the stage that writes it, or `dvc checkout"
        ):
            load(path)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    state, backbone = tmp_path / "teacher.safetensors", tmp_path / "training_state.safetensors"
    save_state(state, TrainingState(2, tensors(), CURVE), {})
    write_backbone(backbone)
    with pytest.raises(ValueError, match=r"teacher\.safetensors is no backbone .*give models/teacher\.safetensors"):
        load_backbone(state)
    with pytest.raises(ValueError, match=r"training_state\.safetensors is no training state"):
        load_state(backbone)


@pytest.mark.parametrize(
    "arch",
    [
        {**ARCH, "embed_dim": 32},
        {**ARCH, "depth": 3},
        {**ARCH, "depth": 1},
        {**ARCH, "num_heads": 3},
        {**ARCH, "width": 16},
        {**ARCH, "family": "resnet"},
        {"family": "torchvision", "name": "resnet18", "in_chans": 3},
        {"family": "torchvision", "name": "resnet", "in_chans": 3},
        {**ARCH, "patch_size": "4"},
        [],
        None,
    ],
)
def test_weights_of_another_architecture_are_refused(arch: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.safetensors: weights do not fit its own architecture"):
        load_backbone(write_backbone(tmp_path / "c.safetensors", arch=arch))


@pytest.mark.parametrize(
    "absurd",
    [{"depth": 10**9}, {"embed_dim": 10**6},
     {"img_size": 10**6}, {"patch_size": 1, "img_size": 4096}, {"in_chans": 10**9},
     {"mlp_ratio": 1e9}, {"depth": -1}, {"depth": 1e300}],
    ids=str,
)  # fmt: skip
def test_an_architecture_of_terabytes_asks_for_no_memory(absurd: Any, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"c\.safetensors: weights do not fit .* more numbers than the [\d,]+ of the"):
        load_backbone(write_backbone(tmp_path / "c.safetensors", arch={**ARCH, **absurd}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    "facts",
    [
        {"step": -1},
        {"step": "2"},
        {"step": True},
        {"curve": [1]},
        {"curve": [{"loss": 1}]},
        {"curve": [{"step": 1, "loss": "low"}]},
        {"curve": None},
    ],
    ids=str,
)
def test_a_state_of_other_content_is_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, tensors(), {"format": "dino-training-state-1", "step": 2, "curve": CURVE} | facts)
    with pytest.raises(ValueError, match=r"state\.safetensors is no training state: its step is"):
        load_state(path)


# Backbones and states


def test_a_backbone_comes_back_and_draws_nothing(tmp_path: Path) -> None:
    path = write_backbone(tmp_path / "c.safetensors", mean=[0.1, 0.2, 0.3])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    backbone, found = load_backbone(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found["arch"], found["mean"]) == (ARCH, [0.1, 0.2, 0.3])
    assert isinstance(backbone, VisionTransformer) and not backbone.training
    for name, tensor in seeded_backbone(ARCH, 5).state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor)


def test_the_untrained_backbone_is_the_one_that_the_training_began_with() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    untrained = untrained_backbone({"arch": ARCH, "seed": CONFIG.seed})
    dino = build_dino(dataclasses.replace(CONFIG, drop_path_rate=0.3), channels=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not untrained.training
    for network in (dino.student.backbone, dino.teacher.backbone):
        for name, tensor in network.state_dict().items():
            assert torch.equal(untrained.state_dict()[name], tensor)
    other = untrained_backbone({"arch": ARCH, "seed": CONFIG.seed + 1})
    assert not torch.equal(other.pos_embed, untrained.pos_embed)


def test_a_state_comes_back_with_its_facts(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, TrainingState(2, tensors(), CURVE), {"key": "0" * 16})
    state, found = load_state(path)
    assert (state.step, state.curve, found) == (2, CURVE, {"key": "0" * 16})
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors().items())
