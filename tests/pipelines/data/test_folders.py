"""Layouts of one's own folders, and what is said when there is nothing to use."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from pipelines.data.folders import read_folder
from pipelines.data.imageset import Entry, ImageSet

PNG = b"\x89PNG: only the first bytes matter here"


def folder_with(root: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def summary(images: ImageSet) -> list[tuple[str, str, str | None]]:
    classes = images.classes or []
    return [(e.source, e.split, None if e.label is None else classes[e.label]) for e in images.entries]


def test_class_folders(tmp_path: Path) -> None:
    images = read_folder(folder_with(tmp_path, "dog/2.png", "cat/1.png", "dog/1.png"))
    assert images.classes == ["cat", "dog"] and not images.official
    assert images.entries == [
        Entry("cat/1.png", "train", 0), Entry("dog/1.png", "train", 1), Entry("dog/2.png", "train", 1),
    ]  # fmt: skip
    assert images.read(1) == PNG
    assert images.layout == "2 class folders"


@pytest.mark.parametrize(
    "names",
    [
        ("1.png", "2.png"),
        ("photos/1.png", "photos/2.png"),  # one folder is no choice between classes
        ("2024/may/1.png", "2024/june/2.png", "2025/may/3.png"),
        ("cat/1.png", "dog/2.png", "3.png"),
        ("cat/1.png", "dog/2.png", "dog/more/3.png"),
    ],
)
def test_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    images = read_folder(folder_with(tmp_path, *names))
    assert images.classes is None and "no labels" in images.layout
    assert summary(images) == [(name, "train", None) for name in sorted(names)]


def test_split_folders_with_classes(tmp_path: Path) -> None:
    names = ("train/cat/1.png", "train/dog/1.png", "Validation/cat/1.png", "test/cat/1.png", "test/emu/1.png")
    images = read_folder(folder_with(tmp_path, *names))
    assert images.classes == ["cat", "dog", "emu"]
    assert sorted(summary(images)) == [
        ("Validation/cat/1.png", "val", "cat"),
        ("test/cat/1.png", "test", "cat"),
        ("test/emu/1.png", "test", "emu"),
        ("train/cat/1.png", "train", "cat"),
        ("train/dog/1.png", "train", "dog"),
    ]


def test_split_folders_without_classes(tmp_path: Path) -> None:
    images = read_folder(folder_with(tmp_path, "train/1.png", "train/2.png", "test/3.png"))
    assert images.classes is None
    assert [entry.split for entry in images.entries] == ["test", "train", "train"]


def test_a_test_folder_without_classes_beside_a_train_folder_with_them_is_said(tmp_path: Path) -> None:
    images = read_folder(folder_with(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/1.png"))
    assert [entry.label for entry in images.entries] == [None, 0, 1]
    assert "test/ has no class folders" in images.layout


def test_the_order_of_creation_does_not_matter(tmp_path: Path) -> None:
    names = [f"{animal}/{i}.png" for animal in ("cat", "dog") for i in range(20)]
    first = read_folder(folder_with(tmp_path / "a", *names))
    second = read_folder(folder_with(tmp_path / "b", *reversed(names)))
    assert first.entries == second.entries


def test_hidden_files_are_ignored_and_other_files_counted(tmp_path: Path) -> None:
    folder_with(tmp_path, "1.png", ".hidden.png", ".git/2.png", "__MACOSX/3.png", "Thumbs.db")
    folder_with(tmp_path, "readme.txt", "labels.csv", data=b"1,2")
    folder_with(tmp_path, "image-without-suffix")
    folder_with(tmp_path, "empty.png", data=b"")  # an image by its name: it is checked later, and reported
    images = read_folder(tmp_path)
    assert [entry.source for entry in images.entries] == ["1.png", "empty.png", "image-without-suffix"]
    assert images.other_files == 2


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder_with(tmp_path / "elsewhere", "1.png")
    folder_with(tmp_path / "mine", "cat/2.png")
    (tmp_path / "mine" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "cat" / "back").symlink_to(tmp_path / "mine")
    images = read_folder(tmp_path / "mine")
    assert [entry.source for entry in images.entries] == ["cat/2.png", "dog/1.png"]


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    """A pipe without a writer, a device without an end, a socket, links to nothing and to themselves."""
    folder_with(tmp_path, "1.png")
    for name in ("pipe.png", "pipe"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(tmp_path / "socket.png"))
        images = read_folder(tmp_path)
        assert [e.source for e in images.entries] == [
            "1.png", "endless.jpg", "gone.png", "loop.png", "pipe.png", "socket.png"
        ]  # fmt: skip
        for row in (1, 4, 5):
            with pytest.raises(ValueError, match="a pipe, socket or device, not a file"):
                images.read(row)
        for row in (2, 3):
            with pytest.raises(OSError):
                images.read(row)
    assert images.other_files == 1


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    folder_with(tmp_path, "1.png")
    os.truncate(tmp_path / "1.png", 1 << 40)  # with holes: a terabyte that takes no room
    with pytest.raises(ValueError, match=r"1\.1 TB, which is no image"):
        read_folder(tmp_path).read(0)


def test_a_folder_that_may_not_be_read_is_told_not_taken_for_empty() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's own may not be entered by other users at all
        root = folder_with(Path(name), "cat/1.png", "dog/2.png", "emu/3.png")
        root.chmod(0o755)
        (root / "dog").chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)  # nobody: root may read everything
            with pytest.raises(PermissionError, match="dog"):
                read_folder(root)
        finally:
            os.seteuid(user)
            (root / "dog").chmod(0o700)


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    images = read_folder(tmp_path)
    assert [entry.source for entry in images.entries] == ["caf\\xe9.png"]
    assert images.read(0) == PNG


def test_what_is_no_folder_of_images_is_an_error_with_place_and_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.folder is '.*/nowhere', and there is no such folder .*params\.yaml"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"data\.folder is '.*/file', which is a file; give the folder"):
        read_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'.*/empty', which holds nothing; put images there"):
        read_folder(tmp_path / "empty")
    folder_with(tmp_path / "texts", "a.txt", "b.txt", data=b"text")
    with pytest.raises(ValueError, match=r"holds 2 files, none of them an image"):
        read_folder(tmp_path / "texts")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/1.png", "more/2.png"), "has train/ and beside them more/; put all"),
        (("train/1.png", "2.png"), "has train/ and beside them images directly in it; put all"),
        (("test/1.png", "cat/2.png", "dog/2.png"), "has test/ and beside them cat/, dog/; put all"),
        (("test/1.png", "val/2.png"), "has test/, val/ but no train/; put all"),
    ],
)
def test_half_a_layout_of_splits_is_an_error(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_folder(folder_with(tmp_path, *names))
