"""Loss, gradient and centre: the reference's numbers, and the paper's double loop over pairs."""

import math

import pytest
import torch
from torch import Tensor

from dino.loss import dino_loss, teacher_probabilities

V, B, K = 5, 3, 7


def outputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher, center = (
        scale * torch.randn(rows, K, generator=generator, dtype=torch.float64) for rows in (V * B, 2 * B, 1)
    )
    return student.to(dtype), teacher.to(dtype), center


def double_loop(student: Tensor, teacher: Tensor, center: Tensor, ts: float = 0.1, tt: float = 0.04) -> Tensor:
    """Algorithm 1 of the paper with multi-crop, a pair at a time, nothing shared with the fast one."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for q, t in enumerate(teacher.double().chunk(2)):
        p = torch.softmax((t - center) / tt, dim=1).detach()
        for v, s in enumerate(student.double().chunk(len(student) // B)):
            if v == q:
                continue
            total = total - (p * torch.log_softmax(s / ts, dim=1)).sum(dim=1).mean()
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("call", range(5))
def test_golden_loss(golden, call: int) -> None:
    reference = golden("loss")
    c = reference.config
    epoch = int(reference[f"epoch/{call}"])
    student = reference[f"student/{call}"].requires_grad_()
    loss, center = dino_loss(
        student,
        reference[f"teacher/{call}"],
        reference[f"centre_before/{call}"],
        student_temp=c["student_temp"],
        teacher_temp=float(reference["teacher_temperature_per_epoch"][epoch]),
        center_momentum=c["center_momentum"],
    )
    torch.testing.assert_close(loss, reference[f"loss/{call}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(center, reference[f"centre_after/{call}"], rtol=0, atol=1e-6)
    (3 * loss).backward()
    torch.testing.assert_close(student.grad, 3 * reference[f"grad/{call}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize(("ts", "tt"), [(0.1, 0.04), (0.3, 0.07), (1.0, 1.0)])
def test_loss_and_gradient_are_the_double_loops(views: int, ts: float, tt: float) -> None:
    student, teacher, center = outputs()
    student = student[: views * B].requires_grad_()
    fast, _ = dino_loss(student, teacher, center, student_temp=ts, teacher_temp=tt)
    slow = double_loop(student, teacher, center, ts, tt)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    fast_gradient, slow_gradient = (torch.autograd.grad(loss, student)[0] for loss in (fast, slow))
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-9, atol=1e-14)


def test_closed_gradient_is_the_numerical_one() -> None:
    student, teacher, center = outputs()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: 5 * dino_loss(s, teacher, center, teacher_temp=0.5)[0], student)


def test_no_gradient_reaches_teacher_and_centre() -> None:
    student, teacher, center = outputs()
    loss, moved = dino_loss(student.requires_grad_(), teacher.requires_grad_(), center)
    loss.backward()
    assert teacher.grad is None and not moved.requires_grad


def test_loss_uses_the_old_centre_and_leaves_it_unchanged() -> None:
    student, teacher, center = outputs()
    before = center.clone()
    loss, moved = dino_loss(student, teacher, center)
    torch.testing.assert_close(center, before, rtol=0, atol=0)
    torch.testing.assert_close(loss, double_loop(student, teacher, before))
    assert not torch.isclose(loss, double_loop(student, teacher, moved), rtol=1e-3)


def test_centre_moves_to_the_mean_of_raw_teacher_outputs() -> None:
    student, teacher, center = outputs()
    _, moved = dino_loss(student, teacher, center, center_momentum=0.8)
    torch.testing.assert_close(moved, 0.8 * center + 0.2 * teacher.sum(0, keepdim=True) / (2 * B))
    assert moved.shape == (1, K)


@pytest.mark.parametrize("parts", [1, 3])
def test_centre_and_loss_are_linear_in_micro_batches(parts: int) -> None:
    student, teacher, center = outputs()
    whole_loss, whole_center = dino_loss(student, teacher, center)
    rows = torch.arange(B).chunk(parts)
    results = [
        dino_loss(student.view(V, B, K)[:, r].flatten(0, 1), teacher.view(2, B, K)[:, r].flatten(0, 1), center)
        for r in rows
    ]
    losses, centers = zip(*results, strict=True)
    torch.testing.assert_close(sum(losses) / parts, whole_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(centers) / parts, whole_center, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_softmaxes_are_at_least_fp32(dtype: torch.dtype) -> None:
    student, teacher, center = outputs(dtype, scale=3.0)
    center = center.float()
    student.requires_grad_()
    loss, moved = dino_loss(student, teacher, center)
    assert loss.dtype == moved.dtype == torch.float32
    torch.testing.assert_close(loss.double(), double_loop(student, teacher, center), rtol=3e-6, atol=0)
    expected = 0.9 * center.double() + 0.1 * teacher.double().mean(0, keepdim=True)
    torch.testing.assert_close(moved.double(), expected, rtol=3e-6, atol=1e-7)
    loss.backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_loss(dtype: torch.dtype) -> None:
    student, teacher, center = outputs(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss, moved = dino_loss(student, teacher, center.float())
    assert loss.dtype == moved.dtype == torch.float32
    torch.testing.assert_close(loss.double(), double_loop(student, teacher, center), rtol=1e-6, atol=0)


@pytest.mark.parametrize("center_dtype", [torch.float32, torch.float64])
def test_float64_stays_float64(center_dtype: torch.dtype) -> None:
    student, teacher, center = outputs(torch.float64)
    center = center.to(center_dtype)
    loss, moved = dino_loss(student, teacher, center)
    assert loss.dtype == moved.dtype == teacher_probabilities(teacher, center, 0.04).dtype == torch.float64
    torch.testing.assert_close(loss, double_loop(student, teacher, center), rtol=1e-12, atol=0)


def test_large_outputs_do_not_overflow() -> None:
    student, teacher, center = outputs(torch.float32, scale=1e4)
    student.requires_grad_()
    loss, _ = dino_loss(student, teacher, center.float())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_uniform_outputs_cost_ln_k() -> None:
    loss, _ = dino_loss(torch.zeros(V * B, K), torch.zeros(2 * B, K), torch.zeros(1, K))
    assert loss.item() == pytest.approx(math.log(K), rel=1e-6)


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "words"),
    [
        ((15, 7), (6, 8), ["[15, 7]", "[6, 8]"]),
        ((15, 7), (5, 7), ["[15, 7]", "[5, 7]"]),
        ((14, 7), (6, 7), ["14 rows", "V * 3"]),
        ((3, 7), (6, 7), ["3 rows", "V >= 2"]),
    ],
)
def test_shapes_that_do_not_fit_are_named(student_shape, teacher_shape, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        dino_loss(torch.zeros(student_shape), torch.zeros(teacher_shape), torch.zeros(1, 7))
    assert all(word in str(error.value) for word in words)
