"""The image table: what is written is what is read, byte for byte and pixel for pixel."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dino.decode import content_id
from dino.images import ImageTable, write_image_table


def encode(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, images: list[bytes], channels: int = 1) -> ImageTable:
    rows = sorted((content_id(data), data) for data in images)
    write_image_table(path, rows, channels=channels, mean=[0.25] * channels, std=[0.5] * channels)
    return ImageTable(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [noise(rng, 6, 5) for _ in range(2500)]  # more than two record batches
    images = {content_id(encode(p)): (encode(p), p) for p in pixels}
    table = write(tmp_path / "t.arrow", [data for data, _ in images.values()])
    assert table.ids == sorted(images) and len(table) == 2500
    assert (table.channels, table.mean, table.std) == (1, [0.25], [0.5])
    rows = [2499, 0, 1023, 1024, 7, 7]
    assert [table.encoded(row) for row in rows] == [images[table.ids[row]][0] for row in rows]
    for _ in range(2):  # decoded, then remembered
        batch = table.batch(rows)
        assert batch.sizes_B2.tolist() == [[6, 5]] * len(rows)
        expected = np.stack([images[table.ids[row]][1] for row in rows])[:, None]
        np.testing.assert_array_equal(batch.pixels_BCHW.numpy(), expected)
    assert table.digest() == hashlib.md5((tmp_path / "t.arrow").read_bytes()).hexdigest()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("sizes", [[(160, 160)], [(160, 160), (150, 170)]], ids=["one size", "many sizes"])
def test_batches_made_in_a_thread_bring_no_threads_with_them(sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    """More OpenMP threads than cores make every barrier of the training sleep."""
    one_coloured = [np.full(sizes[n % len(sizes)], n, np.uint8) for n in range(8)]  # few bytes: decoded in one thread
    table = write(tmp_path / "t.arrow", [encode(pixels) for pixels in one_coloured])

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def brought(work: Callable[[], object]) -> int:
        before = threads()
        work()
        return threads() - before

    large, few = torch.zeros(1_000_000), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as maker:
            assert maker.submit(brought, lambda: [table.batch(range(8)) for _ in range(2)]).result() == 0
            assert maker.submit(brought, large.exp).result() == 1, "an operation of torch would have shown"
    finally:
        torch.set_num_threads(few)


def test_images_of_many_sizes_are_padded_at_the_bottom_and_the_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = {content_id(encode(p)): p for p in (noise(rng, h, w, 3) for h, w in [(4, 9), (7, 3), (5, 5), (5, 5)])}
    table = write(tmp_path / "t.arrow", [encode(p) for p in pixels.values()], channels=3)
    for rows in ([0], [1, 2], [3, 2, 1, 0], [2]):
        batch = table.batch(rows)
        assert batch.pixels_BCHW.shape[2:] == tuple(batch.sizes_B2.amax(0).tolist())
        for row, image_CHW, (height, width) in zip(rows, batch.pixels_BCHW, batch.sizes_B2.tolist(), strict=True):
            expected = pixels[table.ids[row]].transpose(2, 0, 1)
            np.testing.assert_array_equal(image_CHW[:, :height, :width].numpy(), expected)
            assert image_CHW.sum() == expected.sum()  # what was added is 0


def test_large_images_decoded_in_threads_keep_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = {content_id(encode(p)): p for p in (noise(rng, 100, 90 + i % 2) for i in range(12))}
    table = write(tmp_path / "t.arrow", [encode(p) for p in pixels.values()])
    assert table._threads > 1
    batch = table.batch(range(12))
    for row, (height, width) in enumerate(batch.sizes_B2.tolist()):
        np.testing.assert_array_equal(batch.pixels_BCHW[row, 0, :height, :width], pixels[table.ids[row]])


def test_datasets_reads_the_schema_as_images(tmp_path: Path) -> None:
    """The layout that Hugging Face `Dataset.from_file` expects (tried by hand with the library itself)."""
    write(tmp_path / "t.arrow", [encode(np.zeros((3, 3), np.uint8))])
    with pa.ipc.open_stream(tmp_path / "t.arrow") as reader:
        schema = reader.schema
        row = reader.read_all().to_pylist()[0]
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"id": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    assert row["image"]["path"] == row["id"] + ".png" and row["id"] == content_id(row["image"]["bytes"])


def test_the_file_depends_on_the_rows_only_and_appears_whole(tmp_path: Path) -> None:
    images = [encode(np.full((3, 3), i, np.uint8)) for i in range(5)]
    first, second = (write(tmp_path / name, images) for name in ("a.arrow", "b.arrow"))
    assert first.digest() == second.digest()

    def rows_that_fail():  # type: ignore[no-untyped-def]
        yield content_id(images[0]), images[0]
        raise RuntimeError("the disk is gone")

    before = first.digest()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_image_table(tmp_path / "a.arrow", rows_that_fail(), channels=1, mean=[0], std=[1])
    assert first.digest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.arrow", "b.arrow"]


def test_rows_that_are_not_sorted_or_come_twice_are_refused(tmp_path: Path) -> None:
    data = encode(np.zeros((3, 3), np.uint8))
    for ids in (["b", "a"], ["a", "a"]):
        with pytest.raises(AssertionError, match="not sorted"):
            write_image_table(tmp_path / "t", [(i, data) for i in ids], channels=1, mean=[0], std=[1])


def test_another_process_gets_the_same_table(tmp_path: Path) -> None:
    table = write(tmp_path / "t.arrow", [encode(np.full((3, 3), i, np.uint8)) for i in range(5)])
    table.batch([0])
    copy = pickle.loads(pickle.dumps(table))
    assert (copy.ids, copy.digest()) == (table.ids, table.digest())
    assert copy.batch(range(5)).pixels_BCHW.equal(table.batch(range(5)).pixels_BCHW)


def test_a_table_that_is_missing_or_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image table at .*t\.arrow; prepare the data first"):
        ImageTable(tmp_path / "t.arrow")
    (tmp_path / "t.arrow").write_text("something else")
    with pytest.raises(ValueError, match=r"t\.arrow is no image table"):
        ImageTable(tmp_path / "t.arrow")
    write(tmp_path / "t.arrow", [encode(np.zeros((3, 3), np.uint8))])
    whole = (tmp_path / "t.arrow").read_bytes()
    (tmp_path / "t.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t\.arrow is no image table"):
        ImageTable(tmp_path / "t.arrow")


def test_a_damaged_image_is_named_by_its_id(tmp_path: Path) -> None:
    data = encode(np.zeros((30, 30), np.uint8))[:-30]
    write_image_table(tmp_path / "t.arrow", [("abc", data)], channels=1, mean=[0], std=[1])
    with pytest.raises(ValueError, match=r"t\.arrow: image abc: not readable"):
        ImageTable(tmp_path / "t.arrow").batch([0])


def test_a_table_keeps_the_limit_of_its_images(tmp_path: Path) -> None:
    data = encode(np.zeros((30, 30), np.uint8))
    write_image_table(tmp_path / "t.arrow", [("abc", data)], channels=1, mean=[0], std=[1], max_pixels=900)
    assert ImageTable(tmp_path / "t.arrow").batch([0]).pixels_BCHW.shape == (1, 1, 30, 30)
    write_image_table(tmp_path / "t.arrow", [("abc", data)], channels=1, mean=[0], std=[1], max_pixels=899)
    with pytest.raises(ValueError, match=r"t\.arrow: image abc: 30 x 30 pixels: more than data\.max_pixels"):
        ImageTable(tmp_path / "t.arrow").batch([0])


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The table, changed, as Arrow would write it."""
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        table = change(reader.read_all())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def facts_of(**changes: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        facts = json.loads(table.schema.metadata[b"dino"]) | changes
        return table.replace_schema_metadata({"dino": json.dumps(facts)})

    return change


def column(name: str, values: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Any:
    def change(table: pa.Table) -> pa.Table:
        array = pa.array(values(table.column(name).to_pylist()), kind or table.schema.field(name).type)
        return table.set_column(table.schema.get_field_index(name), name, array)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (facts_of(channels=2), "its facts are"),
        (facts_of(channels=True), "its facts are"),
        (facts_of(channels=10**9), "its facts are"),
        (facts_of(mean=[0.1, 0.2]), "its facts are"),
        (facts_of(mean=["a"]), "its facts are"),
        (facts_of(mean=None), "TypeError"),
        (facts_of(std=[0.0]), "its facts are"),
        (facts_of(std=[float("nan")]), "its facts are"),
        (facts_of(max_pixels=0), "its facts are"),
        (lambda table: table.replace_schema_metadata({"dino": "[" * 10**5}), "RecursionError"),
        (lambda table: table.replace_schema_metadata(None), "KeyError"),
        (lambda table: table.select(["id"]), "its columns are"),
        (column("id", lambda ids: [*range(len(ids))], pa.int64()), "its columns are"),
        (column("image", lambda images: ["a"] * len(images), pa.string()), "its columns are"),
        (column("id", lambda ids: [None, *ids[1:]]), "an image or its id is missing"),
        (column("image", lambda images: [None, *images[1:]]), "an image or its id is missing"),
        (column("image", lambda images: [{"bytes": None, "path": ""}] * len(images)), "an image or its id is missing"),
        (column("id", lambda ids: ids[::-1]), "its rows are not sorted"),
        (column("id", lambda ids: ["a"] * len(ids)), "its rows are not sorted"),
    ],
)
def test_a_table_that_is_not_whole_or_not_ours_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.arrow", [encode(np.full((3, 3), i, np.uint8)) for i in range(5)]).path
    rewritten(path, lambda table: table)
    assert len(ImageTable(path)) == 5
    rewritten(path, change)
    with pytest.raises(
        ValueError, match=r"t\.arrow is no image table, or a damaged one .*; prepare the data again"
    ) as told:
        ImageTable(path)
    assert said in str(told.value)


def test_a_table_cut_between_two_batches_is_no_shorter_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino.images.BATCH_ROWS", 2)
    path = write(tmp_path / "t.arrow", [encode(np.full((3, 3), i, np.uint8)) for i in range(6)]).path
    data, ends = path.read_bytes(), []
    with pa.ipc.open_stream(source := pa.BufferReader(data)) as reader:
        ends += [source.tell() for _ in reader]
    path.write_bytes(data[: ends[1]])
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        assert reader.read_all().num_rows == 4, "Arrow itself sees no harm"
    with pytest.raises(ValueError, match="its end is missing"):
        ImageTable(path)
