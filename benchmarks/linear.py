"""Many linear probes at once beside one trained the usual way, and scikit-learn's: python -m benchmarks.linear."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.knn import clustered
from benchmarks.measure import by_turns, emit, peak_extra_bytes, ratios, summary
from benchmarks.options import device_of, parser
from benchmarks.peers import installed
from dino.probe import Setting, train_probes

MOMENTUM = 0.9


def one_probe(features_ND: Tensor, labels_N: Tensor, classes: int, epochs: int, batch: int) -> nn.Linear:
    """One nn.Linear by autograd and torch's SGD on shuffled batches, as the reference trains its one."""
    probe = nn.Linear(features_ND.shape[1], classes).to(features_ND.device)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.01, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(features_ND), device=features_ND.device).split(batch):
            loss = F.cross_entropy(probe(features_ND[rows]), labels_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return probe


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--classes", type=int, default=10)
    options.add_argument("--probes", type=int, default=13)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--batch", type=int, default=1024)
    options.add_argument("--without-sklearn", action="store_true")
    chosen = options.parse_args()
    device = device_of(chosen)
    features_ND, labels_N = clustered(chosen.rows, chosen.width, chosen.classes, 1, device)
    settings = [Setting(lr=10 ** (-2 + 3 * number / chosen.probes), damping=1e-2) for number in range(chosen.probes)]

    def ours() -> object:
        return train_probes(
            features_ND,
            labels_N,
            settings=settings,
            epochs=chosen.epochs,
            batch=chosen.batch,
            momentum=MOMENTUM,
            seed=0,
        )

    calls: dict[str, Callable[[], object]] = {
        "ours": ours,
        "one": lambda: one_probe(features_ND, labels_N, chosen.classes, chosen.epochs, chosen.batch),
    }
    if device.type == "cpu" and installed("sklearn") and not chosen.without_sklearn:
        from sklearn.linear_model import LogisticRegression

        calls["sklearn_one"] = lambda: LogisticRegression(max_iter=100).fit(features_ND.numpy(), labels_N.numpy())
    seconds = by_turns(calls, rounds=chosen.steps, device=device, clock=chosen.clock)
    over = [own / one for own, one in zip(seconds["ours"], seconds["one"], strict=True)]
    results = {
        "probes_s": summary(seconds["ours"]),
        "times_one_probe": summary(over),
        "peers": ratios(seconds, "ours"),
        "peak_memory_bytes": peak_extra_bytes(ours, device),
        "n": chosen.steps,
    }
    emit("linear", vars(chosen), device, results)


if __name__ == "__main__":
    main()
