"""Laws of k-NN: the reference's numbers, plain loops, ties, invariances, chunks, errors at the door."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino import knn
from dino.knn import knn_accuracy, knn_predict, nearest


def slow_ranking(
    bank: list[list[float]], labels: list[int], query: list[float], k: int, temperature: float
) -> list[int]:
    """All labels, the most voted first: the paper's sentence as loops over numbers."""

    def cosine(a: list[float], b: list[float]) -> float:
        length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / length

    similar = sorted(((-cosine(row, query), index) for index, row in enumerate(bank)))
    votes = dict.fromkeys(sorted(set(labels)), 0.0)
    for minus, index in similar[:k]:
        votes[labels[index]] += math.exp(-minus / temperature)
    return sorted(votes, key=lambda label: (-votes[label], label))


def random_problem(
    seed: int, *, bank: int = 150, queries: int = 40, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([-3, 0, 4, 5, 100, 101, 7_000_000_000])
    return (
        torch.randn(bank, width, generator=draw),
        labels[torch.randint(len(labels), (bank,), generator=draw)],
        torch.randn(queries, width, generator=draw),
        labels[torch.randint(len(labels), (queries,), generator=draw)],
    )


def test_golden_top1_and_top5_are_exact(golden: Callable[[str], Any]) -> None:
    numbers = golden("knn")
    found = knn_accuracy(
        numbers["bank"],
        numbers["bank_labels"],
        numbers["queries"],
        numbers["query_labels"],
        neighbours=[1, 10, 20, 100, 200],
        temperature=float(numbers["temperature"]),
    )
    for k, accuracy in found.items():
        assert [100 * share for share in accuracy] == numbers[f"top1_top5/{k}"].tolist(), k


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_loops(seed: int) -> None:
    bank, bank_labels, queries, query_labels = random_problem(seed)
    ks = [1, 3, 20, 150]
    predicted = knn_predict(bank, bank_labels, queries, neighbours=ks, temperature=0.07)
    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, neighbours=ks, temperature=0.07)
    for k in ks:
        rankings = [slow_ranking(bank.tolist(), bank_labels.tolist(), query, k, 0.07) for query in queries.tolist()]
        assert predicted[k].tolist() == [ranking[0] for ranking in rankings]
        for share, first in zip(accuracy[k], (1, min(5, k)), strict=True):
            right = sum(
                label in ranking[:first] for label, ranking in zip(query_labels.tolist(), rankings, strict=True)
            )
            assert share == right / len(queries)


def test_each_k_of_many_equals_k_alone() -> None:
    bank, labels, queries, _ = random_problem(5)
    together = knn_predict(bank, labels, queries, neighbours=[200 // 4, 7, 1], temperature=0.1)
    assert list(together) == [50, 7, 1]
    for k, predicted in together.items():
        assert torch.equal(predicted, knn_predict(bank, labels, queries, neighbours=[k], temperature=0.1)[k])


def test_order_of_the_bank_and_scale_of_features_do_not_matter() -> None:
    bank, labels, queries, truth = random_problem(7)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(1))
    kwargs = {"neighbours": [1, 10, 100], "temperature": 0.07}
    expected = knn_predict(bank, labels, queries, **kwargs)
    for other in (
        knn_predict(bank[order], labels[order], queries, **kwargs),
        knn_predict(bank * torch.rand(150, 1).add(0.1), labels, queries * 1e4, **kwargs),
    ):
        assert all(torch.equal(expected[k], other[k]) for k in expected)
    assert knn_accuracy(bank, labels, queries, truth, **kwargs) == knn_accuracy(
        bank[order], labels[order], queries, truth, **kwargs
    )


def test_equal_neighbours_enter_by_the_lowest_row_and_equal_votes_by_the_lowest_label() -> None:
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([9, 8, 3, 5, 3])
    query = torch.tensor([[1.0, 0.0]])
    _, rows = nearest(bank, query, 5)
    assert rows.tolist() == [[1, 2, 3, 4, 0]]
    predicted = knn_predict(bank, labels, query, neighbours=[1, 2, 3, 4], temperature=0.07)
    assert {k: labels_M.tolist() for k, labels_M in predicted.items()} == {1: [8], 2: [3], 3: [3], 4: [3]}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 300),
    k=st.integers(1, 300),
    levels=st.integers(1, 40),
    tile=st.integers(1, 300),
)
def test_the_nearest_are_those_of_a_stable_sort_whatever_the_ties_and_tiles(
    seed: int, count: int, k: int, levels: int, tile: int
) -> None:
    """Bank rows on an axis with few lengths of a second one: many exactly equal similarities."""
    draw = torch.Generator().manual_seed(seed)
    k = min(k, count)
    steps = torch.randint(levels, (count,), generator=draw).float()
    bank = torch.stack([torch.ones(count), steps], 1)
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    unit = torch.nn.functional.normalize(bank)
    expected = (queries @ unit.T).sort(dim=1, descending=True, stable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "BANK_TILE", tile)
        patch.setitem(knn.QUERY_CHUNK, "cpu", 2)
        values, rows = nearest(bank, queries, k)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(rows, expected.indices[:, :k])


def test_the_short_way_through_long_rows_is_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    for count in (16, 17, 4003, 5001):
        rows = torch.randint(-900, 900, (6, count), generator=draw).float()
        expected = rows.sort(dim=1, descending=True, stable=True)
        for k in (1, 3, 60):
            values, columns = knn._top(rows, k)
            assert torch.equal(values, expected.values[:, :k])
            assert torch.equal(columns, expected.indices[:, :k])


@pytest.mark.parametrize("queries", [0, 1, 3])
def test_any_number_of_queries_and_one_class(queries: int) -> None:
    bank, *_ = random_problem(3)
    labels = torch.full((len(bank),), 6)
    predicted = knn_predict(bank, labels, bank[:queries], neighbours=[5], temperature=0.07)
    assert predicted[5].tolist() == [6] * queries
    accuracy = knn_accuracy(bank, labels, bank[:3], labels[:3], neighbours=[5], temperature=0.07)
    assert accuracy[5] == (1.0, 1.0)


def test_a_class_that_the_bank_lacks_is_never_right() -> None:
    bank, labels, queries, _ = random_problem(3)
    for label in (-10, 1, 8_000_000_000):
        strange = torch.full((len(queries),), label)
        accuracy = knn_accuracy(bank, labels, queries, strange, neighbours=[150], temperature=0.07)
        assert accuracy[150] == (0.0, 0.0)


def test_votes_do_not_overflow_at_a_low_temperature() -> None:
    bank, labels, queries, _ = random_problem(2)
    predicted = knn_predict(bank, labels, queries, neighbours=[1, 50], temperature=1e-4)
    assert torch.equal(predicted[1], predicted[50])  # only the nearest counts


@pytest.mark.parametrize("k", [0, -1, 151])
def test_k_outside_the_bank_is_refused_with_place_and_cure(k: int) -> None:
    bank, labels, queries, _ = random_problem(0)
    with pytest.raises(ValueError, match=rf"knn\.neighbours holds {k}.*150 labelled rows; choose from 1 to 150"):
        knn_predict(bank, labels, queries, neighbours=[5, k], temperature=0.07)


def test_bad_temperature_and_features_that_are_not_finite_are_refused() -> None:
    bank, labels, queries, _ = random_problem(0)
    with pytest.raises(ValueError, match=r"knn\.temperature is 0"):
        knn_predict(bank, labels, queries, neighbours=[5], temperature=0)
    queries[3, 2] = torch.nan
    with pytest.raises(ValueError, match="queries are not all finite"):
        knn_predict(bank, labels, queries, neighbours=[5], temperature=0.07)
