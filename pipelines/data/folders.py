"""A folder of one's own images: which files, which split, which class.

folder/cat/1.jpg, folder/dog/2.jpg               class folders
folder/1.jpg, folder/2.jpg                       no labels
folder/2024/may/1.jpg, folder/2024/june/2.jpg    no labels: images of different depths, or two or more down
folder/train/..., folder/test/..., folder/val/... any of these in each; val/ and test/ may be missing
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dino.decode import extension
from dino.files import in_bytes
from pipelines.data.imageset import SPLITS, Entry, ImageSet

IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"])
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val"} | {name: name for name in SPLITS}
NEVER_IMAGES = frozenset(("thumbs.db", "desktop.ini", "__macosx"))  # beside hidden files, which begin with a dot
HEAD_BYTES = 16
MAX_FILE_BYTES = 1 << 30  # of an image file; 80 million pixels of four channels and 16 bits take 640 MB


def read_folder(folder: Path) -> ImageSet:
    """Find the images of a folder, and labels where its layout gives them.

    Files that are images neither by suffix nor by their first bytes are counted and left alone.

    Raises:
        ValueError: the folder is missing, is a file, holds no images, or mixes split folders with others.
        OSError: a folder in it can't be read.
    """
    if not folder.exists():
        raise ValueError(
            f"data.folder is '{folder}', and there is no such folder (looked for {folder.absolute()}); "
            "correct it in params.yaml"
        )
    if not folder.is_dir():
        raise ValueError(f"data.folder is '{folder}', which is a file; give the folder that holds the images")
    images, other_files = find_images(folder)
    if not images:
        found = f"{other_files:,} files, none of them an image" if other_files else "nothing"
        raise ValueError(
            f"data.folder is '{folder}', which holds {found}; put images there "
            "(PNG, JPEG, WEBP, BMP, TIFF, GIF; hidden files do not count), or name another folder in params.yaml"
        )
    splits, inner = _splits(folder, images)
    classes = _classes(splits, inner)
    names = sorted({name for name in classes if name is not None})
    number = {name: index for index, name in enumerate(names)}
    labels = [None if name is None else number[name] for name in classes]
    entries = [Entry(printable(p), split, label) for p, split, label in zip(images, splits, labels, strict=True)]
    return ImageSet(
        entries,
        [printable(name) for name in names] or None,
        read=lambda index: read_file(folder / images[index]),
        official=False,
        layout=_layout(splits, classes),
        other_files=other_files,
    )


def find_images(folder: Path) -> tuple[list[PurePosixPath], int]:
    """Images below a folder (by suffix or first bytes), relative and sorted; how many other files there are.

    Raises:
        OSError: a folder in it can't be read.
    """
    files = _files(folder)
    images = [path for path in files if _maybe_image(folder / path)]
    return images, len(files) - len(images)


def _files(folder: Path) -> list[PurePosixPath]:
    """All files below, relative, in an order that does not depend on the disk; links to folders are followed."""
    found: list[PurePosixPath] = []
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if _counts(name)]
        relative = PurePosixPath(Path(place).relative_to(folder).as_posix())
        found += [relative / name for name in files if _counts(name)]
    return sorted(found)


def _refuse(error: OSError) -> None:
    """A folder that can't be read is no empty folder: its class would be missing without a word."""
    raise error


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: it is a pipe, a socket or a device, whose reading may never end, or larger than any image.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("a pipe, socket or device, not a file")
    if about.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{in_bytes(about.st_size)}, which is no image")
    return path.read_bytes()


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in NEVER_IMAGES


def _maybe_image(path: Path) -> bool:
    """By its suffix (then it is checked, and reported when it is broken) or its first bytes."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if not path.is_file():  # opening a pipe would wait for its writer
        return False
    try:
        with path.open("rb") as file:
            return extension(file.read(HEAD_BYTES)) != ""
    except OSError:
        return False


def _splits(folder: Path, images: Sequence[PurePosixPath]) -> tuple[list[str], list[PurePosixPath]]:
    """Split of each image, and its path below the split's folder; all are train where there is no train/."""
    tops = {path.parts[0] if len(path.parts) > 1 else "" for path in images}
    named = {top for top in tops if top.lower() in SPLIT_NAMES}
    if not named:
        return ["train"] * len(images), list(images)
    others = sorted(f"{name}/" if name else "images directly in it" for name in tops - named)
    if others or "train" not in {SPLIT_NAMES[top.lower()] for top in named}:
        beside = f" and beside them {', '.join(others[:5])}" if others else " but no train/"
        raise ValueError(
            f"data.folder is '{folder}', which has {', '.join(sorted(f'{name}/' for name in named))}{beside}; "
            "put all images or class folders into train/, test/ and, if you like, val/"
        )
    splits = [SPLIT_NAMES[path.parts[0].lower()] for path in images]
    return splits, [path.relative_to(path.parts[0]) for path in images]


def _classes(splits: Sequence[str], inner: Sequence[PurePosixPath]) -> list[str | None]:
    """Class name of each image: of its folder, where all images of the split lie in folders one level down.

    Train decides whether there are classes at all: two at least.
    """
    one_down = dict.fromkeys(splits, True)
    for split, path in zip(splits, inner, strict=True):
        one_down[split] &= len(path.parts) == 2
    names = [path.parts[0] if one_down[split] else None for split, path in zip(splits, inner, strict=True)]
    if len({name for split, name in zip(splits, names, strict=True) if split == "train"} - {None}) < 2:
        return [None] * len(names)
    return names


def _layout(splits: Sequence[str], classes: Sequence[str | None]) -> str:
    """ "train/ and test/, 10 class folders" """
    with_labels = {split for split, name in zip(splits, classes, strict=True) if name is not None}
    without = sorted(set(splits) - with_labels)
    where = "" if set(splits) == {"train"} else " and ".join(f"{s}/" for s in SPLITS if s in splits) + ", "
    if not with_labels:
        return where + "no labels (classes are two or more folders with all images directly in them)"
    count = len(set(classes) - {None})
    return where + f"{count:,} class folders" + "".join(f"; {split}/ has no class folders" for split in without)


def printable(path: PurePosixPath | str) -> str:
    """A name that is no UTF-8, with its odd bytes escaped."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")
