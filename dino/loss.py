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

    With s = student / temperature and lse its logsumexp, the sum over pairs of -p_q . log_softmax(s_v) is
    sum_v n_v lse_v - sum_q p_q . (sum_v s_v - s_q), n_v being the teacher views that differ from v. So one
    logsumexp per row and two dot products per image do it, without a pair loop; the gradient is closed too.
    """

    @staticmethod
    def forward(ctx: Any, student_VBK: Tensor, target_QBK: Tensor, temperature: float) -> Tensor:
        V, B, _ = student_VBK.shape
        scores_VBK = wide(student_VBK) / temperature
        lse_VB = torch.logsumexp(scores_VBK, dim=-1)
        total_BK = scores_VBK.sum(dim=0)
        matched = sum((target_QBK[q] * (total_BK - scores_VBK[q])).sum() for q in range(GLOBAL_VIEWS))
        pairs = GLOBAL_VIEWS * (V - 1)
        weighted_lse = GLOBAL_VIEWS * lse_VB.sum() - lse_VB[:GLOBAL_VIEWS].sum()
        ctx.save_for_backward(student_VBK, target_QBK, lse_VB)
        ctx.temperature = temperature
        return (weighted_lse - matched) / (pairs * B)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        student_VBK, target_QBK, lse_VB = ctx.saved_tensors
        V, B, _ = student_VBK.shape
        grad_VBK = torch.exp(wide(student_VBK) / ctx.temperature - lse_VB[..., None])
        grad_VBK[GLOBAL_VIEWS:] *= GLOBAL_VIEWS
        grad_VBK[GLOBAL_VIEWS:] -= target_QBK.sum(dim=0)
        grad_VBK[0] -= target_QBK[1]
        grad_VBK[1] -= target_QBK[0]
        grad_VBK *= grad_outputs[0] / (GLOBAL_VIEWS * (V - 1) * B * ctx.temperature)
        return grad_VBK.to(student_VBK.dtype), None, None


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
