"""What is said of a prepared data set: its metrics, warnings, and a sheet of samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dino.decode import open_image
from pipelines.data.examine import Examined
from pipelines.data.imageset import ImageSet
from pipelines.data.sheet import sample_sheet

BROKEN_SHARE = 0.5  # with more broken images than this, something else is wrong
BROKEN_LISTED = 10
CLASSES_LISTED = 20  # with more classes, the balance is summed up
DARK = 64  # of 255: where no pixel of a whole set is brighter, it was probably scaled wrongly
SHEET_ROWS, SHEET_COLUMNS = 12, 10


class Row(NamedTuple):
    """One image of the tables."""

    split: str
    id: str
    entry: int  # its index in the image set
    label: int | None
    name: str | None  # of its class
    source: str


Tables = Mapping[str, Sequence[Row]]  # split -> rows by id


def data_metrics(tables: Tables, images: ImageSet, examined: Examined, duplicates: Mapping[str, int]) -> dict[str, Any]:
    """Counts, class balance and sizes, of the images in the tables."""
    entries = [row.entry for rows in tables.values() for row in rows]
    heights, widths = examined.sizes_N2[entries].T.tolist()
    return {
        "images": {split: len(rows) for split, rows in tables.items()},
        "classes": None if images.classes is None else len(images.classes),
        "class_balance": None if images.classes is None else _balance(tables, images.classes),
        "height_px": _spread(heights),
        "width_px": _spread(widths),
        "grey": int(examined.grey_N[entries].sum()),
        "shrunk": examined.shrunk,
        "duplicates": dict(duplicates),
        "broken": len(examined.broken),
        "other_files": images.other_files,
    }


def _balance(tables: Tables, classes: Sequence[str]) -> dict[str, Any]:
    """Images of each class in each split; their spread, where there are too many classes to read."""
    counts = {split: Counter(row.name for row in rows) for split, rows in tables.items()}
    if len(classes) > CLASSES_LISTED:
        return {split: _spread([found[name] for name in classes]) for split, found in counts.items()}
    return {split: {name: found[name] for name in classes} for split, found in counts.items()}


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"smallest": min(values), "median": median(values), "largest": max(values)}


def broken_warnings(examined: Examined, folder: Path) -> list[str]:
    """Name the images that could not be read.

    Raises:
        ValueError: they are more than half.
    """
    count, total = len(examined.broken), len(examined.ids)
    if not count:
        return []
    listed = [f"{examined.images.entries[row].source}: {why}" for row, why in examined.broken.items()]
    listed[BROKEN_LISTED:] = [f"and {count - BROKEN_LISTED:,} more"] if count > BROKEN_LISTED else []
    if count > BROKEN_SHARE * total:
        raise ValueError(
            f"data.folder is '{folder}', where {count:,} of {total:,} images can't be read; is the copy or download "
            f"complete? {'; '.join(listed)}"
        )
    return [f"{count:,} of {total:,} images can't be read and are left out:", *(f"  {line}" for line in listed)]


def duplicate_warnings(duplicates: Mapping[str, int], official: bool) -> list[str]:
    """Duplicates and what became of them, one line each kind."""
    done = "kept, as the set is published so" if official else "left out"
    words = {
        "within_train": "further copies of training images",
        "within_val": "further copies of val images",
        "within_test": "further copies of test images",
        "train_in_val": "training images that are val images too",
        "train_in_test": "training images that are test images too",
        "val_in_test": "val images that are test images too",
    }
    lines = [f"{duplicates[kind]:,} {text}: {done}" for kind, text in words.items() if duplicates[kind]]
    if conflicts := duplicates["label_conflicts"]:
        which = "each copy keeps its own" if official else "the first copy's is kept"
        lines.append(f"{conflicts:,} images lie in several classes: {which}")
    return lines


def brightness_warnings(examined: Examined) -> list[str]:
    """A hint at 16-bit files that use fewer bits."""
    if examined.brightest >= DARK:
        return []
    return [
        f"the brightest pixel of all images is {examined.brightest} of 255; where 16-bit files hold fewer bits, "
        "scale them to the full range"
    ]


def sheet(tables: Tables, images: ImageSet, examined: Examined, max_pixels: int) -> bytes:
    """Training images as a PNG picture, a row a class."""
    rows: list[tuple[str, list[Row]]]
    train = tables["train"]
    if images.classes is None:
        rows = [("", list(train[start : start + SHEET_COLUMNS])) for start in range(0, len(train), SHEET_COLUMNS)]
    else:
        rows = [(name, [row for row in train if row.name == name][:SHEET_COLUMNS]) for name in images.classes]
    shown = [(name, members) for name, members in rows[:SHEET_ROWS] if members]
    return sample_sheet(
        [(name, [open_image(examined.read(row.entry), max_pixels) for row in members]) for name, members in shown]
    )
