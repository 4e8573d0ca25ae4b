"""DINO: student, momentum teacher, and the public names of the method (paper section 3.1, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dino.ema import ema_update
from dino.head import DINOHead
from dino.loss import GLOBAL_VIEWS, dino_loss
from dino.multicrop import MultiCropWrapper
from dino.vision_transformer import VisionTransformer, vit_base, vit_small, vit_tiny

__all__ = [
    "DINO",
    "DINOHead",
    "MultiCropWrapper",
    "VisionTransformer",
    "dino_loss",
    "vit_base",
    "vit_small",
    "vit_tiny",
]


class DINO(nn.Module):
    """Student and teacher of one architecture; the teacher starts with the student's weights and has no gradient.

    The teacher's backbone should have no stochastic depth of its own (drop_path_rate 0, the default).

    Raises:
        ValueError: Teacher and student differ in architecture, or share parameters.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, student_head: nn.Module, teacher_head: nn.Module
    ) -> None:
        super().__init__()
        self.student = MultiCropWrapper(student, student_head)
        self.teacher = MultiCropWrapper(teacher, teacher_head)
        try:
            self.teacher.load_state_dict(self.student.state_dict())
        except RuntimeError as error:
            raise ValueError(f"teacher and student must have the same architecture: {error}") from error
        if {id(p) for p in self.student.parameters()} & {id(p) for p in self.teacher.parameters()}:
            raise ValueError("teacher and student share parameters: make a separate backbone and head for the teacher")
        self.teacher.requires_grad_(False)

    def forward(
        self, images: Sequence[Tensor], drop_path_draws: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Student on all crops, teacher on the two global ones.

        Args:
            images: V crops [B, C, H, W], the two global ones first.
            drop_path_draws: For each crop the student's draws of stochastic depth, or None.

        Returns:
            student_out [V * B, K] in crop order, and teacher_out [2 * B, K] without gradient.

        Raises:
            ValueError: Fewer than two crops.
        """
        if len(images) < GLOBAL_VIEWS:
            raise ValueError("images must be a list of crops [B, C, H, W] that starts with the two global crops")
        with torch.no_grad():
            teacher_out = self.teacher(images[:GLOBAL_VIEWS])
        return self.student(images, drop_path_draws), teacher_out

    def update_teacher(self, momentum: float) -> None:
        """Teacher parameters <- momentum * teacher + (1 - momentum) * student."""
        ema_update(self.teacher, self.student, momentum)
