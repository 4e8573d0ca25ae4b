"""The loss, forward and backward, beside the pair loop and lightly's: python -m benchmarks.loss --batches 4 16 32."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import by_turns, emit, peak_extra_bytes, ratios, summary
from benchmarks.options import device_of, parser
from benchmarks.peers import lightly_loss
from benchmarks.plain import moved_center, pair_loss
from dino.loss import dino_loss
from dino.memory import keep_freed_memory

VIEWS = 10


def contestants_of(batch: int, prototypes: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Calls that compute loss, gradient and new centre of the same outputs."""
    student = torch.randn(VIEWS * batch, prototypes, device=device).requires_grad_()
    teacher, center = torch.randn(2 * batch, prototypes, device=device), torch.zeros(1, prototypes, device=device)

    def ours() -> object:
        loss, moved = dino_loss(student, teacher, center)
        student.grad = None
        loss.backward()
        return moved

    def plain() -> object:
        loss, moved = pair_loss(student, teacher, center, 0.1, 0.04), moved_center(center, teacher, 0.9)
        student.grad = None
        loss.backward()
        return moved

    calls: dict[str, Callable[[], object]] = {"ours": ours, "plain": plain}
    if (theirs := lightly_loss(prototypes, device)) is not None:

        def lightly() -> None:
            student.grad = None
            theirs(list(teacher.chunk(2)), list(student.chunk(VIEWS)), epoch=1).backward()

        calls["lightly"] = lightly
    return calls


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[4, 16, 32])
    options.add_argument("--out-dim", type=int, default=65536)
    chosen = options.parse_args()
    device = device_of(chosen)
    if device.type == "cpu":
        keep_freed_memory()
    results: dict[str, Any] = {}
    for batch in chosen.batches:
        calls = contestants_of(batch, chosen.out_dim, device)
        seconds = by_turns(calls, rounds=chosen.steps, device=device, clock=chosen.clock)
        memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
        results[str(batch)] = {
            "loss_s": summary(seconds["ours"]),
            "peers": ratios(seconds, "ours"),
            "peak_memory_bytes": memory,
            "memory_share_of_plain": memory["ours"] / memory["plain"],
        }
    emit("loss", vars(chosen), device, {"by_batch": results, "n": chosen.steps})


if __name__ == "__main__":
    main()
