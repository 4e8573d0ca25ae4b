"""Weighted k-NN for several k beside its bare product, a pass a k, and scikit-learn: python -m benchmarks.knn."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import by_turns, emit, peak_extra_bytes, ratios, summary
from benchmarks.options import device_of, parser
from benchmarks.peers import installed
from dino.knn import QUERY_CHUNK, knn_accuracy

TEMPERATURE = 0.07
PLAIN_CHUNKS = 100


def clustered(rows: int, width: int, classes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [N, D] around a centre a class, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (rows,), generator=generator)
    noise = 3 * torch.randn(rows, width, generator=generator)
    return F.normalize(centres[labels] + noise).to(device), labels.to(device)


def bare_product(bank_ND: Tensor, queries_MD: Tensor) -> Callable[[], object]:
    """All similarities, chunk by chunk into the same memory, and nothing done with them."""
    step = QUERY_CHUNK.get(queries_MD.device.type, QUERY_CHUNK["cpu"])
    memory = bank_ND.new_empty(min(step, len(queries_MD)), len(bank_ND))

    def call() -> None:
        for part in queries_MD.split(step):
            torch.mm(part, bank_ND.T, out=memory[: len(part)])

    return call


def plain_knn(bank_ND: Tensor, labels_N: Tensor, queries_MD: Tensor, truth_M: Tensor, k: int, classes: int) -> float:
    """Accuracy for one k: similarities, top k, one-hot votes, weights."""
    right = 0
    chunk = max(1, len(queries_MD) // PLAIN_CHUNKS)
    for queries_QD, truth_Q in zip(queries_MD.split(chunk), truth_M.split(chunk), strict=True):
        similarity_QK, rows_QK = (queries_QD @ bank_ND.T).topk(k, largest=True, sorted=True)
        votes_QKC = F.one_hot(labels_N[rows_QK], classes).float()
        weights_QK1 = (similarity_QK / TEMPERATURE).exp()[..., None]
        right += int(((votes_QKC * weights_QK1).sum(1).argmax(1) == truth_Q).sum())
    return right / len(queries_MD)


def sklearn_knn(bank_ND: Tensor, labels_N: Tensor, queries_MD: Tensor, k: int) -> Callable[[], object]:
    """scikit-learn's classifier, brute force, for one k."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(
        k, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(bank_ND.numpy(), labels_N.numpy())
    return lambda: model.predict(queries_MD.numpy())


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--queries", type=int, default=10_000)
    options.add_argument("--bank", type=int, default=60_000)
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--classes", type=int, default=10)
    options.add_argument("--neighbours", type=int, nargs="+", default=[10, 20, 100, 200])
    options.add_argument("--without-sklearn", action="store_true")
    chosen = options.parse_args()
    device = device_of(chosen)
    bank_ND, labels_N = clustered(chosen.bank, chosen.width, chosen.classes, 1, device)
    queries_MD, truth_M = clustered(chosen.queries, chosen.width, chosen.classes, 2, device)
    ks: Sequence[int] = chosen.neighbours

    def ours() -> dict[int, float]:
        found = knn_accuracy(bank_ND, labels_N, queries_MD, truth_M, neighbours=ks, temperature=TEMPERATURE)
        return {k: accuracy.top1 for k, accuracy in found.items()}

    def plain() -> dict[int, float]:
        return {k: plain_knn(bank_ND, labels_N, queries_MD, truth_M, k, chosen.classes) for k in ks}

    calls: dict[str, Callable[[], object]] = {"ours": ours, "product": bare_product(bank_ND, queries_MD)}
    calls["plain"] = plain
    if device.type == "cpu" and installed("sklearn") and not chosen.without_sklearn:
        calls["sklearn_one_k"] = sklearn_knn(bank_ND, labels_N, queries_MD, max(ks))
    seconds = by_turns(calls, rounds=chosen.steps, device=device, clock=chosen.clock, warm_up=0)
    over = [own / bare for own, bare in zip(seconds["ours"], seconds["product"], strict=True)]
    results = {
        "knn_s": summary(seconds["ours"]),
        "times_its_product": summary(over),
        "peers": ratios(seconds, "ours"),
        "peak_memory_bytes": peak_extra_bytes(ours, device),
        "top1": {str(k): share for k, share in ours().items()},
        "n": chosen.steps,
    }
    emit("knn", vars(chosen), device, results)


if __name__ == "__main__":
    main()
