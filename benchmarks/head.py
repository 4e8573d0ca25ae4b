"""The projection head, forward and backward, beside its bare products and lightly's: python -m benchmarks.head."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.measure import by_turns, emit, peak_extra_bytes, ratios, summary
from benchmarks.options import device_of, parser
from benchmarks.peers import lightly_head
from benchmarks.plain import Head
from dino.head import DINOHead
from dino.memory import keep_freed_memory

HIDDEN, BOTTLENECK = 2048, 256


def trained(head: nn.Module, x_ND: Tensor, gradient_NK: Tensor) -> Callable[[], object]:
    """Forward and backward of a head."""

    def call() -> None:
        head.zero_grad(set_to_none=True)
        x_ND.grad = None
        head(x_ND).backward(gradient_NK)

    return call


def bare_products(rows: int, width: int, prototypes: int, device: torch.device) -> Callable[[], object]:
    """The matrix products alone, into memory that is there: each layer's output, input gradient, weight gradient."""
    sides = [width, HIDDEN, HIDDEN, BOTTLENECK, prototypes]
    inputs = [torch.randn(rows, side, device=device) for side in sides]
    weights = [torch.randn(out, into, device=device) for into, out in pairwise(sides)]
    outs = [torch.empty_like(x) for x in inputs]
    weight_outs = [torch.empty_like(w) for w in weights]

    def call() -> None:
        for layer, weight in enumerate(weights):
            torch.mm(inputs[layer], weight.T, out=outs[layer + 1])
        for layer, weight in reversed(list(enumerate(weights))):
            torch.mm(inputs[layer + 1], weight, out=outs[layer])
            torch.mm(inputs[layer + 1].T, inputs[layer], out=weight_outs[layer])

    return call


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=320, help="crops: 10 an image")
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--out-dim", type=int, default=65536)
    chosen = options.parse_args()
    device = device_of(chosen)
    if device.type == "cpu":
        keep_freed_memory()
    x_ND = torch.randn(chosen.rows, chosen.width, device=device).requires_grad_()
    gradient_NK = torch.randn(chosen.rows, chosen.out_dim, device=device)
    heads: dict[str, nn.Module | None] = {
        "ours": DINOHead(chosen.width, chosen.out_dim, hidden_dim=HIDDEN, bottleneck_dim=BOTTLENECK).to(device),
        "plain": Head(chosen.width, chosen.out_dim, HIDDEN, BOTTLENECK).to(device),
        "lightly": lightly_head(chosen.width, chosen.out_dim, HIDDEN, BOTTLENECK, device),
    }
    calls = {name: trained(head, x_ND, gradient_NK) for name, head in heads.items() if head is not None}
    calls["products"] = bare_products(chosen.rows, chosen.width, chosen.out_dim, device)
    seconds = by_turns(calls, rounds=chosen.steps, device=device, clock=chosen.clock)
    over = [ours / bare for ours, bare in zip(seconds["ours"], seconds["products"], strict=True)]
    results = {
        "head_s": summary(seconds["ours"]),
        "times_its_products": summary(over),
        "peers": ratios(seconds, "ours"),
        "peak_memory_bytes": {name: peak_extra_bytes(call, device) for name, call in calls.items()},
        "n": chosen.steps,
    }
    emit("head", vars(chosen), device, results)


if __name__ == "__main__":
    main()
