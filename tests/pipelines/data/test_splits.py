"""Splits depend on image ids, the partition into classes and the seed, and on nothing else."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.splits import assign, cut, find_duplicates, number_duplicates


def some_ids(count: int, salt: str = "") -> list[str]:
    return [hashlib.md5(f"{salt}{i}".encode()).hexdigest()[:16] for i in range(count)]


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1)
FEW = settings(max_examples=40, deadline=None, derandomize=True)
FRACTIONS = st.sampled_from([0.05, 0.1, 0.29, 0.5, 0.9])


def labelled(sizes: list[int]) -> dict[str, int]:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return dict(zip(some_ids(len(labels)), labels, strict=True))


@FEW
@given(SIZES, FRACTIONS, st.integers(0, 3))
def test_each_class_gives_its_share_and_the_total_is_right(sizes: list[int], fraction: float, seed: int) -> None:
    classes = labelled(sizes)
    chosen = cut(classes, fraction, seed)
    for label, size in enumerate(sizes):
        count = sum(classes[image_id] == label for image_id in chosen)
        assert abs(count - size * fraction) < 1
        assert count < size, "a class lost all its images"
    if all(size * fraction <= size - 1 for size in sizes):
        assert len(chosen) == max(round(sum(sizes) * fraction), 1)


@FEW
@given(SIZES, FRACTIONS, st.randoms())
def test_names_of_classes_and_order_of_images_do_not_matter(sizes: list[int], fraction: float, random) -> None:  # type: ignore[no-untyped-def]
    classes = labelled(sizes)
    names = [f"class {number}" for number in random.sample(range(1000), len(sizes))]
    shuffled = random.sample(list(classes), len(classes))
    assert cut({i: names[classes[i]] for i in shuffled}, fraction, 0) == cut(classes, fraction, 0)


@FEW
@given(SIZES, FRACTIONS, st.data())
def test_a_new_image_moves_few_others(sizes: list[int], fraction: float, data: st.DataObject) -> None:
    classes = labelled(sizes)
    label = data.draw(st.integers(0, len(sizes)))  # also of a new class
    before = cut(classes, fraction, 0)
    after = cut(classes | {some_ids(1, "new")[0]: label}, fraction, 0)
    assert len((before ^ after) & classes.keys()) <= 4


def test_another_seed_cuts_otherwise_and_both_are_spread() -> None:
    classes = dict.fromkeys(some_ids(1000), 0)
    first, second = cut(classes, 0.1, 0), cut(classes, 0.1, 1)
    assert len(first) == len(second) == 100
    assert 2 <= len(first & second) <= 25  # 10 expected by chance


def test_what_the_source_gives_stays_and_the_rest_is_cut_from_train() -> None:
    ids = some_ids(100)
    given_test = ["test" if i < 30 else "train" for i in range(100)]
    result = assign(ids, given_test, [0] * 100, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert result[:30] == ["test"] * 30
    assert (result.count("val"), result.count("train")) == (7, 63)
    result = assign(ids, ["train"] * 100, [None] * 100, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert (result.count("test"), result.count("val"), result.count("train")) == (20, 8, 72)


def test_images_without_labels_stay_in_train_where_others_have_labels() -> None:
    ids = some_ids(100)
    labels = [i % 2 if i < 40 else None for i in range(100)]
    result = assign(ids, ["train"] * 100, labels, val_fraction=0.25, test_fraction=0.5, seed=0)
    assert set(result[40:]) == {"train"}
    assert (result.count("test"), result.count("val")) == (20, 5)


def test_each_image_is_kept_once_in_test_before_val_before_train() -> None:
    ids = ["a", "a", "b", "b", "b", "c", "c", "d", "d", "e"]
    splits = ["train", "train", "train", "val", "test", "val", "val", "test", "test", "train"]
    kept, counts = find_duplicates(ids, splits)
    assert kept == [0, 4, 5, 7, 9]
    assert {kind: count for kind, count in counts.items() if count} == {
        "within_train": 1, "train_in_test": 1, "val_in_test": 1, "within_val": 1, "within_test": 1,
    }  # fmt: skip


@pytest.mark.parametrize("ids", [[], ["a", "b"], ["a", "a", "b", "a"]])
def test_numbered_duplicates_are_unique(ids: list[str]) -> None:
    unique = number_duplicates(ids)
    assert len(set(unique)) == len(ids)
    assert [image_id.split("-")[0] for image_id in unique] == ids
    assert number_duplicates(["a", "a", "b", "a"]) == ["a", "a-1", "b", "a-2"]
