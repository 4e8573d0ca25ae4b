"""Who is train, val and test: pure functions of image ids, classes and a seed.

Class names and the order of files play no part, so renaming a class changes no split, and a new image moves few others.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence


def cut(classes: Mapping[str, Hashable], fraction: float, seed: int) -> set[str]:
    """Choose a share of the ids, from each class its share.

    Inside a class the ids with the lowest hash of (seed, id) are chosen. Rounding goes to the classes with the
    largest remainders, so that the total is right even if each class is small; each class keeps one image at least.

    Args:
        classes: id -> class (anything that can be compared for equality; ids without labels share one).
    """
    members: dict[Hashable, list[str]] = {}
    for image_id in classes:
        members.setdefault(classes[image_id], []).append(image_id)
    ranked = [sorted(ids, key=lambda image_id: _hash(seed, image_id)) for ids in members.values()]
    total = min(max(round(len(classes) * fraction), 1), len(classes) - 1) if fraction > 0 else 0
    counts = [int(len(ids) * fraction) for ids in ranked]
    # Equal remainders: by a hash of the class's first image, as names must not matter.
    by_remainder = sorted(
        range(len(ranked)), key=lambda i: (counts[i] - len(ranked[i]) * fraction, _hash(seed, ranked[i][0]))
    )
    left = total - sum(counts)
    for i in by_remainder:
        if left > 0 and counts[i] < len(ranked[i]) * fraction and counts[i] + 1 < len(ranked[i]):
            counts[i] += 1
            left -= 1
    return {image_id for ids, count in zip(ranked, counts, strict=True) for image_id in ids[:count]}


def assign(
    ids: Sequence[str],
    splits: Sequence[str],
    labels: Sequence[int | None],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> list[str]:
    """The split of each image: the source's own, and cut from train where the source has no test or no val.

    Where some images have labels, only those are cut: val and test are there to score on.
    """
    result = list(splits)
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in splits:
            rows = [row for row in range(len(ids)) if result[row] == "train"]
            labelled = [row for row in rows if labels[row] is not None]
            chosen = cut({ids[row]: labels[row] for row in labelled or rows}, fraction, seed)
            for row in rows:
                if ids[row] in chosen:
                    result[row] = split
    return result


def find_duplicates(ids: Sequence[str], splits: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Rows to keep so that each image is there once, in test before val before train; and what the others are.

    Returns:
        The rows, ascending; and counts of the other rows: "within_train" (a further copy in train),
        "train_in_test" (a training image that is a test image too: leakage), and so on.
    """
    homes: dict[str, str] = {}
    kept: list[int] = []
    counts = dict.fromkeys(
        ("within_train", "within_val", "within_test", "train_in_val", "train_in_test", "val_in_test"), 0
    )
    for split in ("test", "val", "train"):
        for row in (row for row in range(len(ids)) if splits[row] == split):
            home = homes.get(ids[row])
            if home is None:
                homes[ids[row]] = split
                kept.append(row)
            else:
                counts[f"within_{split}" if home == split else f"{split}_in_{home}"] += 1
    return sorted(kept), counts


def number_duplicates(ids: Sequence[str]) -> list[str]:
    """Make ids unique: the second image of an id becomes id-1, the third id-2."""
    seen: dict[str, int] = {}
    unique = []
    for image_id in ids:
        count = seen[image_id] = seen.get(image_id, -1) + 1
        unique.append(f"{image_id}-{count}" if count else image_id)
    return unique


def _hash(seed: int, image_id: str) -> bytes:
    return hashlib.md5(f"{seed} {image_id}".encode(), usedforsecurity=False).digest()
