"""Snapshots are the teacher at the end of an epoch, whatever the training was interrupted by."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EPOCHS, STEPS, STEPS_PER_EPOCH, write_table
from torch import Tensor
from two_ranks import CONFIG

from dino.checkpoint import load_backbone, load_tensors
from dino.config import PretrainConfig
from dino.distributed import World
from dino.images import ImageTable
from dino.networks import backbone_arch
from dino.pretrain import Interrupted, pretrain
from dino.snapshots import Snapshots, kept_epochs, snapshot_path, snapshots_in, teacher_backbone
from dino.training_state import TrainingState

ALONE = World(0, 1, torch.device("cpu"))
EACH = CONFIG.__class__(**{**vars(CONFIG), "snapshot_epochs": 1})
FACTS: dict[str, Any] = {"arch": backbone_arch(CONFIG, 3), "key": "k", "mean": [0.2] * 3, "std": [0.3] * 3}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return write_table(tmp_path_factory.mktemp("tiny") / "train.arrow")


def train(table: ImageTable, folder: Path, *, stop_after: int = STEPS, state: TrainingState | None = None) -> Any:
    """Snapshots of a training in `folder`, and the state of every step."""
    states: dict[int, TrainingState] = {state.step: state} if state else {}
    snapshots = Snapshots(folder, FACTS, STEPS_PER_EPOCH)
    first = state.step if state else 0
    steps = iter(range(first + 1, STEPS + 1))
    try:
        pretrain(
            EACH,
            table,
            world=ALONE,
            precision=torch.float32,
            state=state,
            snapshot=snapshots.save,
            save=lambda state: states.update({state.step: state}),
            should_save=lambda: True,
            should_stop=lambda: next(steps) == stop_after,
        )
    except Interrupted:
        assert max(states) == stop_after
    return snapshots, states


@pytest.fixture(scope="module")
def whole(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training that nobody interrupts."""
    return train(table, tmp_path_factory.mktemp("whole"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("epochs", "every", "kept"),
    [(5, 1, [1, 2, 3, 4, 5]), (5, 2, [2, 4, 5]), (6, 2, [2, 4, 6]), (4, 4, [4]), (3, 10, [3])],
)
def test_each_so_many_epochs_and_the_last_are_kept(epochs: int, every: int, kept: list[int]) -> None:
    assert kept_epochs(PretrainConfig(epochs=epochs, snapshot_epochs=every, warmup_epochs=0)) == kept


def test_a_snapshot_is_the_teacher_at_the_end_of_its_epoch(whole: Any) -> None:
    snapshots, states = whole
    assert [*snapshots_in(snapshots.folder)] == [1, EPOCHS]
    for epoch, path in snapshots_in(snapshots.folder).items():
        backbone, facts = load_backbone(path)
        assert {**FACTS, "epoch": epoch, "step": epoch * STEPS_PER_EPOCH}.items() <= facts.items()
        expected = teacher_backbone(states[epoch * STEPS_PER_EPOCH].tensors)
        assert backbone.state_dict().keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in backbone.state_dict().items())
    first, last = (load_tensors(path)[0] for path in snapshots_in(snapshots.folder).values())
    assert any(not first[name].equal(last[name]) for name in first)


@pytest.mark.parametrize("stop_after", [STEPS_PER_EPOCH - 2, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3])
def test_an_interrupted_training_leaves_the_same_snapshots(
    whole: Any, table: ImageTable, tmp_path: Path, stop_after: int
) -> None:
    _, states = train(table, tmp_path, stop_after=stop_after)
    train(table, tmp_path, state=states[stop_after])
    assert content(tmp_path) == content(whole[0].folder)


def test_a_snapshot_from_after_the_state_is_made_anew(whole: Any, table: ImageTable, tmp_path: Path) -> None:
    """Killed between a snapshot and the next save, and then the file was damaged too."""
    snapshots, states = train(table, tmp_path, stop_after=STEPS_PER_EPOCH)
    before = states[STEPS_PER_EPOCH - 1]
    snapshot_path(tmp_path, 1).write_bytes(b"cut")
    assert snapshots.check(kept_epochs(EACH), before.step, before.tensors) == {}
    train(table, tmp_path, state=before)
    assert content(tmp_path) == content(whole[0].folder)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def another_trainings(path: Path) -> None:
    tensors, _ = load_tensors(path)
    Snapshots(path.parent, {**FACTS, "key": "other"}, STEPS_PER_EPOCH).save(1, tensors)


HARM = [(Path.unlink, "missing"), (damage, "checksum"), (another_trainings, "another training")]


@pytest.mark.parametrize(("harm", "why"), HARM)
def test_a_snapshot_that_a_state_should_find_is_made_from_it_or_told_lost(
    whole: Any, tmp_path: Path, harm: Any, why: str
) -> None:
    _, states = whole
    snapshots = Snapshots(tmp_path, FACTS, STEPS_PER_EPOCH)
    for epoch, path in snapshots_in(whole[0].folder).items():
        snapshot_path(tmp_path, epoch).write_bytes(path.read_bytes())
    assert snapshots.check([1, 2], STEPS, states[STEPS].tensors) == {}
    harm(snapshot_path(tmp_path, 1))
    at, later = states[STEPS_PER_EPOCH], states[STEPS_PER_EPOCH + 1]
    lost = snapshots.check([1, 2], later.step, later.tensors)
    assert [*lost] == [1] and why in lost[1]
    assert snapshots.check([1, 2], at.step, at.tensors) == {}
    assert content(tmp_path) == content(whole[0].folder)


def test_published_snapshots_are_verified(whole: Any, tmp_path: Path) -> None:
    snapshots, _ = whole
    snapshots.publish(tmp_path / "out", [2])
    assert content(tmp_path / "out") == {"epoch_0002.safetensors": content(snapshots.folder)["epoch_0002.safetensors"]}
    copy = Snapshots(tmp_path / "out", FACTS, STEPS_PER_EPOCH)
    damage(snapshot_path(copy.folder, 2))
    with pytest.raises(ValueError, match="altered or damaged"):
        copy.publish(tmp_path / "again", [2])
    assert not (tmp_path / "again").exists() or not content(tmp_path / "again")


def test_no_snapshots_is_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no snapshots in .*`dvc repro pretrain` makes them"):
        snapshots_in(tmp_path)


def test_a_teacher_that_is_not_finite_is_no_snapshot(table: ImageTable, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino import ema, model

    def poisoned(teacher: torch.nn.Module, student: torch.nn.Module, momentum: float) -> None:
        ema.ema_update(teacher, student, momentum)
        next(teacher.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(model, "ema_update", poisoned)
    kept: list[dict[str, Tensor]] = []
    short = EACH.__class__(**{**vars(EACH), "batch": 10})  # epochs of three steps, too short for a point of the curve
    with pytest.raises(FloatingPointError, match="not finite"):
        pretrain(short, table, world=ALONE, precision=torch.float32, snapshot=lambda epoch, b: kept.append(b))
    assert not kept
