"""Snapshots: the teacher's backbone as it was at the end of some epochs, each a checkpoint file of its own.

A snapshot is written before any state of its step or a later one is saved, so an interrupted training finds one of:
- a snapshot later than the state that it resumes from: the training makes it anew, over the old file, so that all
  snapshots are of the training that went on;
- every snapshot up to that state: nothing to do;
- a snapshot up to that state is missing or damaged (by other hands, or a failing disk). Where the state stands at that
  very step, it holds the same weights. Else only a training from the start would bring it back: it is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dino.checkpoint import BACKBONE_FORMAT, load_tensors, save_tensors
from dino.config import PretrainConfig

TEACHER_BACKBONE = "teacher.backbone."  # how a training state names those weights


def kept_epochs(config: PretrainConfig) -> list[int]:
    """Epochs (the first is 1) whose teacher is kept: every `snapshot_epochs`-th, and always the last."""
    return [*range(config.snapshot_epochs, config.epochs, config.snapshot_epochs), config.epochs]


def snapshot_path(folder: Path, epoch: int) -> Path:
    """File of one epoch."""
    return folder / f"epoch_{epoch:04d}.safetensors"


def snapshots_in(folder: Path) -> dict[int, Path]:
    """Files of a folder by their epoch, in order.

    Raises:
        ValueError: There are none.
    """
    found = {int(path.stem.removeprefix("epoch_")): path for path in folder.glob("epoch_[0-9]*.safetensors")}
    if not found:
        raise ValueError(f"no snapshots in {folder}; `dvc repro pretrain` makes them, `dvc checkout {folder}` too")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Snapshots:
    """Snapshots of one training.

    Attributes:
        folder: Where they lie while it is under way.
        facts: What every backbone file says: arch, seed, channels, mean, std, params, data_md5, key.
        steps_per_epoch: Optimizer steps.
    """

    folder: Path
    facts: Mapping[str, Any]
    steps_per_epoch: int

    def save(self, epoch: int, backbone: Mapping[str, Tensor]) -> None:
        """Keep the teacher's backbone (its state_dict) as it is at the end of this epoch."""
        place = {"format": BACKBONE_FORMAT, "epoch": epoch, "step": epoch * self.steps_per_epoch}
        save_tensors(snapshot_path(self.folder, epoch), dict(backbone), {**self.facts, **place})

    def check(self, epochs: list[int], step: int, tensors: Mapping[str, Tensor]) -> dict[int, str]:
        """Why snapshots that a training state should find are lost; one that the state itself holds is written anew.

        Args:
            epochs: Those that the whole training keeps.
            step: Steps that the state has done.
            tensors: Its weights.
        """
        lost = {}
        for epoch in epochs:
            if epoch * self.steps_per_epoch <= step and (problem := self._problem(epoch)):
                if epoch * self.steps_per_epoch == step:
                    self.save(epoch, teacher_backbone(tensors))
                else:
                    lost[epoch] = problem
        return lost

    def _problem(self, epoch: int) -> str:
        path = snapshot_path(self.folder, epoch)
        if not path.is_file():
            return "missing"
        try:
            _, facts = load_tensors(path)
        except ValueError as problem:
            return str(problem)
        return "" if facts.get("key") == self.facts["key"] else "it is of another training"

    def publish(self, folder: Path, epochs: list[int]) -> None:
        """Write those of these epochs to another folder, verified on the way."""
        for epoch in epochs:
            save_tensors(snapshot_path(folder, epoch), *load_tensors(snapshot_path(self.folder, epoch)))


def teacher_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's backbone out of a training state, by its own names."""
    return {
        name.removeprefix(TEACHER_BACKBONE): tensor
        for name, tensor in tensors.items()
        if name.startswith(TEACHER_BACKBONE)
    }
