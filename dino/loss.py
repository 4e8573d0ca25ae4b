"""Teacher-student cross-entropy with centring (paper section 3.1, equations 1 to 4, algorithm 1).

Shapes: V views (crops), the first 2 of them global; B images; K prototypes.
"""

from typing import Any

import torch
from torch import Tensor

GLOBAL_VIEWS = 2


def wide(x: Tensor) -> Tensor:
    """At least fp32, whatever autocast chose; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def teacher_probabilities(teacher_out: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Centred and sharpened targets softmax((output - centre) / temperature), [2 * B, K]."""
    return torch.softmax((wide(teacher_out) - center) / teacher_temp, dim=-1)


class _ViewCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over all (teacher view, other student view) pairs.

    The sum over pairs of -p_q . l_v, l being student log-probabilities, is -sum_q p_q . (sum_v l_v - l_q): one
    log-softmax a view and two dot products an image do it, without a pair loop. The gradient is closed too, and made
    on the way, view by view: what is K wide and lives longer than a view is the gradient and the sum.
    """

    @staticmethod
    def forward(ctx: Any, student_VBK: Tensor, target_QBK: Tensor, temperature: float) -> Tensor:
        V, B, _ = student_VBK.shape
        pairs = GLOBAL_VIEWS * (V - 1)
        both_BK = target_QBK.sum(dim=0)
        others_VBK = [*reversed(target_QBK.unbind())] + [both_BK] * (V - GLOBAL_VIEWS)
        gradient_VBK = torch.empty_like(student_VBK) if ctx.needs_input_grad[0] else None
        matched = both_BK.new_zeros(())
        for v, others_BK in enumerate(others_VBK):
            log_BK = torch.log_softmax(wide(student_VBK[v]) / temperature, dim=-1)
            matched = matched + torch.dot(others_BK.flatten(), log_BK.flatten())
            if gradient_VBK is not None:
                weight = GLOBAL_VIEWS - (v < GLOBAL_VIEWS)  # teacher views that differ from this one
                difference_BK = log_BK.exp_().mul_(weight).sub_(others_BK)
                gradient_VBK[v] = difference_BK.mul_(1 / (pairs * B * temperature))
        ctx.save_for_backward(gradient_VBK)
        return -matched / (pairs * B)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient_VBK,) = ctx.saved_tensors
        if grad_outputs[0].device.type == "cpu" and grad_outputs[0] == 1:  # a CPU can look without waiting
            return gradient_VBK, None, None
        return gradient_VBK * grad_outputs[0].to(gradient_VBK.dtype), None, None


def dino_loss(
    student_out: Tensor,
    teacher_out: Tensor,
    center: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    center_momentum: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Loss with the given centre, and the centre moved by this batch (equation 4).

    The new centre is linear in the teacher's outputs: over micro-batches or ranks of equal size, the mean of the
    centres returned is the centre of the whole batch.

    Args:
        student_out: [V * B, K] in crop order, the two global crops first.
        teacher_out: [2 * B, K] of the two global crops, without gradient.
        center: [1, K], at least fp32; not changed.
        student_temp: Temperature of the student's softmax.
        teacher_temp: Temperature of the teacher's softmax.
        center_momentum: Share of the old centre that stays.

    Returns:
        Scalar loss, and the new centre [1, K].

    Raises:
        ValueError: Shapes that do not fit each other.
    """
    rows, prototypes = teacher_out.shape
    if rows % GLOBAL_VIEWS or student_out.shape[-1] != prototypes:
        raise ValueError(
            f"student_out {list(student_out.shape)} must be [V * B, K] and teacher_out {list(teacher_out.shape)} "
            "[2 * B, K]"
        )
    images = rows // GLOBAL_VIEWS
    views, rest = divmod(len(student_out), images)
    if rest or views < GLOBAL_VIEWS:
        raise ValueError(f"student_out has {len(student_out)} rows; it must be V * {images} with V >= {GLOBAL_VIEWS}")
    teacher_out = wide(teacher_out.detach())
    target = teacher_probabilities(teacher_out, center, teacher_temp)
    loss: Tensor = _ViewCrossEntropy.apply(
        student_out.reshape(views, images, prototypes),
        target.reshape(GLOBAL_VIEWS, images, prototypes),
        student_temp,
    )
    batch_center = teacher_out.mean(dim=0, keepdim=True)
    return loss, center * center_momentum + batch_center * (1.0 - center_momentum)
