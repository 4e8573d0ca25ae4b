"""The first difference of two files of each format, by name and size; equal content is none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.differences import difference


def tensors(path: Path, shift: float = 0.0, step: int = 1) -> None:
    values = torch.zeros(4, 5)
    values[1, 2] += shift
    save_file({"a": torch.ones(3), "b": values}, path, metadata={"dino": json.dumps({"step": step})})


def table(path: Path, shift: float = 0.0, rows: int = 3) -> None:
    columns = {
        "id": [f"i{i}" for i in range(rows)],
        "features": [[float(i), 1.0 + shift * (i == 2)] for i in range(rows)],
    }
    pq.write_table(pa.table(columns), path)


def arrow(path: Path, last: bytes = b"z") -> None:
    content = pa.table({"id": ["x", "y"], "bytes": [b"a", last]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, content.schema) as writer:
        writer.write_table(content)


def picture(path: Path, grey: int = 7) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[2, 3, 1] = grey
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("name", "write", "changes", "said"),
    [
        ("a.safetensors", tensors, {"shift": 0.5}, "tensor b: 1 of 20 values, by 0.5 at most"),
        ("a.safetensors", tensors, {"step": 2}, "metadata.dino.step: 1 before, 2 now, by 1"),
        (
            "a.parquet",
            table,
            {"shift": 0.25},
            "column features, first in row 2: [2.0, 1.0] before, [2.0, 1.25] now; 1 of 6 values, by 0.25 at most",
        ),
        ("a.parquet", table, {"rows": 4}, "3 rows before, 4 now"),
        ("a.arrow", arrow, {"last": b"q"}, "column bytes, first in row 1: b'z' before, b'q' now"),
        ("a.png", picture, {"grey": 9}, "pixels: 1 of 72 values, by 2 at most"),
    ],
)
def test_files_of_a_format(
    name: str, write: Callable[..., None], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for folder, arguments in (("before", {}), ("same", {}), ("now", changes)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, **arguments)
    assert difference(tmp_path / "before" / name, tmp_path / "same" / name) is None
    assert difference(tmp_path / "before" / name, tmp_path / "now" / name) == said
    assert difference(tmp_path / "before", tmp_path / "now") == f"{name}: {said}"


@pytest.mark.parametrize(
    ("name", "before", "now", "said"),
    [
        ("a.json", '{"a": [1, {"b": 2.5}]}', '{"a": [1, {"b": 2}]}', "a[1].b: 2.5 before, 2 now, by 0.5"),
        ("a.json", '{"a": "x"}', "{}", "a: x before, (nothing) now"),
        (
            "a.json",
            '{"a": 1, "b": 2}',
            '{"b": 2, "a": 1}',
            "same content, other bytes; first other byte at 2 (16 bytes",
        ),
        ("a.json", "{", "{]", "cannot be read as .json"),
        (
            "a.csv",
            "step,loss\n1,2.5\n2,2.25\n",
            "step,loss\n1,2.5\n2,2.5\n",
            "row 2, column loss: 2.25 before, 2.5 now",
        ),
        ("a.csv", "step,loss\n1,2.5\n", "step,loss\n", "row 1, column step: 1 before, (nothing) now"),
        ("a.html", "<p>one", "<p>two", "first other byte at 3 (6 bytes before, 6 now)"),
        ("a.html", "<p>", "<p>two", "first other byte at 3 (3 bytes before, 6 now)"),
    ],
)
def test_texts(name: str, before: str, now: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir(), (tmp_path / "now").mkdir()
    (tmp_path / "before" / name).write_text(before)
    (tmp_path / "now" / name).write_text(now)
    assert (difference(tmp_path / "before" / name, tmp_path / "now" / name) or "").startswith(said)


def test_a_file_that_is_missing_in_a_folder(tmp_path: Path) -> None:
    for folder, names in (("before", ("a", "b")), ("now", ("b", "c"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    assert difference(tmp_path / "before", tmp_path / "now") == "a: not there now"
    (tmp_path / "before/a").unlink()
    assert difference(tmp_path / "before", tmp_path / "now") == "c: not there before"
