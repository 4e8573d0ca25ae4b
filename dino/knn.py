"""Weighted k-nearest-neighbour classification of features (appendix F.1 of the paper), all k in one pass.

Legend: N bank rows, M queries, Q queries of one chunk, D features, K neighbours, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

BANK_TILE = 65_536  # bank rows compared at once
QUERY_CHUNK = {"cpu": 256, "cuda": 4096}  # queries compared at once; with the tile: 64 MiB, 1 GiB of similarities


class Accuracy(NamedTuple):
    """Shares of the queries, 0 to 1, whose class has the most votes, or is among the five with the most."""

    top1: float
    top5: float


def knn_predict(
    bank_ND: torch.Tensor,
    bank_labels_N: torch.Tensor,
    queries_MD: torch.Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float,
) -> dict[int, torch.Tensor]:
    """Label [M] of each query for each number of neighbours; where votes are equal, the lowest label.

    Args:
        bank_ND: features of labelled images, any scale: only their direction counts.
        bank_labels_N: int64, any values.
        queries_MD: features to classify.
        neighbours: every k wanted; the cost is that of the largest.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).

    Raises:
        ValueError: a k outside 1..N, a temperature not above 0, or features that are not finite.
    """
    classes_C, bank_classes_N = bank_labels_N.unique(return_inverse=True)
    found: dict[int, list[torch.Tensor]] = {k: [] for k in neighbours}
    for _, k, votes_QC in _votes(
        bank_ND, bank_classes_N, len(classes_C), queries_MD, neighbours=neighbours, temperature=temperature
    ):
        found[k].append(classes_C[votes_QC.argmax(1)])
    empty = bank_labels_N[:0]
    return {k: torch.cat([empty, *parts]) for k, parts in found.items()}


def knn_accuracy(
    bank_ND: torch.Tensor,
    bank_labels_N: torch.Tensor,
    queries_MD: torch.Tensor,
    query_labels_M: torch.Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float,
) -> dict[int, Accuracy]:
    """Accuracy for each number of neighbours; arguments and errors as in `knn_predict`.

    A class without a vote ranks behind the others, lowest first, and with fewer than five neighbours
    top-5 counts the first k classes (both as in the reference).
    """
    classes_C, bank_classes_N = bank_labels_N.unique(return_inverse=True)
    column_M = torch.searchsorted(classes_C, query_labels_M).clamp_(max=len(classes_C) - 1)
    known_M = classes_C[column_M] == query_labels_M
    top1, top5 = dict.fromkeys(neighbours, 0), dict.fromkeys(neighbours, 0)
    for chunk, k, votes_QC in _votes(
        bank_ND, bank_classes_N, len(classes_C), queries_MD, neighbours=neighbours, temperature=temperature
    ):
        column_Q1 = column_M[chunk, None]
        own_Q1 = votes_QC.gather(1, column_Q1)
        lower_QC = torch.arange(len(classes_C), device=votes_QC.device) < column_Q1
        rank_Q = ((votes_QC > own_Q1) | ((votes_QC == own_Q1) & lower_QC)).sum(1)
        top1[k] += int((known_M[chunk] & (rank_Q < 1)).sum())
        top5[k] += int((known_M[chunk] & (rank_Q < min(5, k))).sum())
    count = max(1, len(queries_MD))
    return {k: Accuracy(top1[k] / count, top5[k] / count) for k in neighbours}


def nearest(bank_ND: torch.Tensor, queries_MD: torch.Tensor, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities [M, K] and bank rows [M, K], nearest first; of equal ones the lowest row first.

    Raises:
        ValueError: `neighbours` outside 1..N, or features that are not finite.
    """
    _check(bank_ND, queries_MD, [neighbours])
    parts = [(values, rows) for _, values, rows in _nearest_chunks(bank_ND, queries_MD, neighbours)]
    if not parts:
        shape = (0, neighbours)
        return queries_MD.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=queries_MD.device)
    values_MK, rows_MK = (torch.cat(column) for column in zip(*parts, strict=True))
    return values_MK, rows_MK


def _check(bank_ND: torch.Tensor, queries_MD: torch.Tensor, neighbours: Sequence[int]) -> None:
    for k in neighbours:
        if not 1 <= k <= len(bank_ND):
            raise ValueError(
                f"knn.neighbours holds {k}, but the bank has {len(bank_ND)} labelled rows; "
                f"choose from 1 to {len(bank_ND)}, or give more labelled images"
            )
    for name, features in (("bank", bank_ND), ("queries", queries_MD)):
        if not torch.isfinite(features).all():
            raise ValueError(f"features of the {name} are not all finite: has the training diverged?")


def _votes(
    bank_ND: torch.Tensor,
    bank_classes_N: torch.Tensor,
    classes: int,
    queries_MD: torch.Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float,
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """For chunks of queries, for rising k: (chunk, k, votes [Q, C]); the votes are reused, read them at once."""
    if not temperature > 0:
        raise ValueError(f"knn.temperature is {temperature}; choose a number above 0 (the paper: 0.07)")
    _check(bank_ND, queries_MD, neighbours)
    wanted = set(neighbours)
    for chunk, similarity_QK, rows_QK in _nearest_chunks(bank_ND, queries_MD, max(wanted)):
        # relative to the nearest: the same ranking of classes, and no overflow at a low temperature
        weights_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
        classes_QK = bank_classes_N[rows_QK]
        votes_QC = weights_QK.new_zeros(len(weights_QK), classes)
        for k in range(1, max(wanted) + 1):
            # one neighbour at a time: no two votes of a row meet, so the order of sums is fixed, on CUDA too
            votes_QC.scatter_add_(1, classes_QK[:, k - 1 : k], weights_QK[:, k - 1 : k])
            if k in wanted:
                yield chunk, k, votes_QC


def _nearest_chunks(
    bank_ND: torch.Tensor, queries_MD: torch.Tensor, k: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Per chunk of queries: (chunk, similarities [Q, K], bank rows [Q, K]), in tiles of bounded memory."""
    step = QUERY_CHUNK.get(queries_MD.device.type, QUERY_CHUNK["cpu"])
    bank_ND = F.normalize(bank_ND)
    # one memory for all products: asking the system for fresh pages costs up to as much as a product of 64 columns
    memory = bank_ND.new_empty(min(step, len(queries_MD)) * min(BANK_TILE, len(bank_ND)))
    for start in range(0, len(queries_MD), step):
        chunk = slice(start, min(start + step, len(queries_MD)))
        queries_QD = F.normalize(queries_MD[chunk])
        values = queries_QD.new_empty(len(queries_QD), 0)
        columns = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
        for first in range(0, len(bank_ND), BANK_TILE):
            tile_TD = bank_ND[first : first + BANK_TILE]
            similarity_QT = memory[: len(queries_QD) * len(tile_TD)].view(len(queries_QD), len(tile_TD))
            torch.mm(queries_QD, tile_TD.T, out=similarity_QT)
            more, more_columns = _top(similarity_QT, k)
            values, columns = _merge(values, columns, more, more_columns + first, k)
        yield chunk, values, columns


def _merge(
    values: torch.Tensor, columns: torch.Tensor, more: torch.Tensor, more_columns: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of two sorted lists of which the first has the lower columns; of equal ones the lowest first."""
    if not values.shape[1]:
        return more, more_columns
    values, order = torch.cat([values, more], 1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], torch.cat([columns, more_columns], 1).gather(1, order[:, :k])


def _top(similarity_QN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k (or N, if fewer) largest of each row and their columns, largest first; of equal ones the lowest."""
    k = min(k, similarity_QN.shape[1])
    # one more than wanted: equal neighbours, also across the k-th place, then show
    values, columns = _top_any_order(similarity_QN, min(k + 1, similarity_QN.shape[1]))
    tied_Q = (values[:, 1:] == values[:, :-1]).any(1)
    values, columns = values[:, :k], columns[:, :k]
    if tied_Q.any():
        tied = tied_Q.nonzero()[:, 0]
        rows_TN, last_T1 = similarity_QN[tied], values[tied, -1:]
        above_TN, equal_TN = rows_TN > last_T1, rows_TN == last_T1
        room_T1 = k - above_TN.sum(1, keepdim=True)
        chosen_TN = above_TN | (equal_TN & (equal_TN.cumsum(1) <= room_T1))
        columns_TK = chosen_TN.nonzero()[:, 1].view(len(tied), k)
        values_TK, order = rows_TN.gather(1, columns_TK).sort(dim=1, descending=True, stable=True)
        values, columns = values.clone(), columns.clone()
        values[tied], columns[tied] = values_TK, columns_TK.gather(1, order)
    return values, columns


def _top_any_order(similarity_QN: torch.Tensor, k: int, *, sorted: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk, cheaper for long rows.

    Columns are dealt to N / 4 groups; only the k groups with the largest maxima can hold one of the k largest, and
    those groups are found in the same way. So a row of 60,000 is read once, and each sort is a short one.
    """
    each = 4
    count = similarity_QN.shape[1]
    groups = count // each
    if groups < 4 * k:
        return torch.topk(similarity_QN, k, dim=1, sorted=sorted)
    dealt = groups * each
    maxima_QG = similarity_QN[:, :dealt].unflatten(1, (each, groups)).amax(1)
    _, best_QK = _top_any_order(maxima_QG, k, sorted=False)
    member = torch.arange(0, dealt, groups, device=similarity_QN.device)[:, None]
    columns = (best_QK[:, None, :] + member).flatten(1)
    if dealt < count:
        rest = torch.arange(dealt, count, device=columns.device)
        columns = torch.cat([columns, rest.expand(len(columns), -1)], 1)
    values, order = similarity_QN.gather(1, columns).topk(k, dim=1, sorted=sorted)
    return values, columns.gather(1, order)
