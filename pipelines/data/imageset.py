"""What `prepare` works on, wherever the images come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "val", "test")


class Entry(NamedTuple):
    """One image, before it is read."""

    source: str  # for people: a path relative to the folder, or "train-images[17]"
    split: str  # one of SPLITS, as the source has it
    label: int | None  # index into ImageSet.classes


@dataclass(frozen=True)
class ImageSet:
    """Images of one source.

    Attributes:
        entries: every image.
        classes: name of each class; None where there are no labels.
        read: index of an entry -> its encoded bytes (PNG, JPEG ...).
        official: a published set, of which every image stays where it is, duplicates too.
        layout: one line for people: what was found.
        other_files: files that are no images by name and content, left alone.
    """

    entries: Sequence[Entry]
    classes: Sequence[str] | None
    read: Callable[[int], bytes]
    official: bool
    layout: str
    other_files: int = 0
