"""How two versions of a file or folder differ, in one line: which part first, and by how much."""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open

ABSENT = "(nothing)"


def difference(before: Path, now: Path) -> str | None:
    """The first difference as "file: what, by how much"; None where there is none.

    Args:
        before: A file or a folder.
        now: What it is compared with; lines name it by its path in there.
    """
    if before.is_dir() or now.is_dir():
        for name in sorted(_files(before) | _files(now)):
            if found := _of_files(before / name, now / name):
                return f"{name}: {found}"
        return None
    return _of_files(before, now)


def _files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def _of_files(before: Path, now: Path) -> str | None:
    for path, which in ((before, "before"), (now, "now")):
        if not path.is_file():
            return f"not there {which}"
    if before.read_bytes() == now.read_bytes():
        return None
    compare = BY_SUFFIX.get(now.suffix)
    if compare:
        try:
            return compare(before, now) or f"same content, other bytes; {_bytes(before, now)}"
        except Exception as error:  # a damaged file of any format: its bytes still tell where
            return f"cannot be read as {now.suffix} ({error}); {_bytes(before, now)}"
    return _bytes(before, now)


def _bytes(before: Path, now: Path) -> str:
    a, b = before.read_bytes(), now.read_bytes()
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"first other byte at {first:,} ({len(a):,} bytes before, {len(b):,} now)"


def _numbers(before: Any, now: Any) -> str:
    """By how much two arrays of one shape and type differ."""
    if not np.issubdtype(now.dtype, np.number):
        return f"{np.count_nonzero(before != now):,} of {now.size:,} values"
    a, b = before.astype(np.float64), now.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    largest = np.abs(a - b)[finite].max(initial=0.0)
    count = np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))
    return f"{count:,} of {now.size:,} values, by {largest:.3g} at most"


def _safetensors(before: Path, now: Path) -> str | None:
    with safe_open(before, framework="pt") as a, safe_open(now, framework="pt") as b:
        names = sorted({*a.keys(), *b.keys()})
        for name in names:
            if name not in a.keys() or name not in b.keys():  # noqa: SIM118 (no mapping)
                return f"tensor {name} is there {'before' if name in a.keys() else 'now'} only"  # noqa: SIM118
            x, y = a.get_tensor(name), b.get_tensor(name)
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                return f"tensor {name}: {x.dtype} {list(x.shape)} before, {y.dtype} {list(y.shape)} now"
            if x.numel() and not np.array_equal(x.view(-1).numpy(), y.view(-1).numpy()):
                return f"tensor {name}: {_numbers(x.numpy(), y.numpy())}"
        facts = [{k: _parsed(v) for k, v in (file.metadata() or {}).items()} for file in (a, b)]
    return _first_value(facts[0], facts[1], "metadata")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _first_value(before: Any, now: Any, place: str) -> str | None:
    """The first place of nested lists and mappings where two values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if found := _first_value(before.get(key, ABSENT), now.get(key, ABSENT), f"{place}.{key}".strip(".")):
                return found
        return None
    if isinstance(before, list) and isinstance(now, list):
        for index, (a, b) in enumerate(zip_longest(before, now, fillvalue=ABSENT)):
            if found := _first_value(a, b, f"{place}[{index}]"):
                return found
        return None
    if before == now:
        return None
    by = ""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, now)):
        by = f", by {abs(before - now):.3g}"
    return f"{place}: {before} before, {now} now{by}"


def _json(before: Path, now: Path) -> str | None:
    return _first_value(json.loads(before.read_text()), json.loads(now.read_text()), "")


def _csv(before: Path, now: Path) -> str | None:
    with before.open(newline="") as a, now.open(newline="") as b:
        rows: Iterator[tuple[list[str], list[str]]] = zip_longest(csv.reader(a), csv.reader(b), fillvalue=[])
        header: list[str] = []
        for number, (x, y) in enumerate(rows):
            header = header or y
            for column, (p, q) in enumerate(zip_longest(x, y, fillvalue=ABSENT)):
                if p != q:
                    name = header[column] if column < len(header) else column
                    return f"row {number}, column {name}: {p} before, {q} now"
    return None


def _tables(read: Callable[[Path], pa.Table]) -> Callable[[Path, Path], str | None]:
    def compare(before: Path, now: Path) -> str | None:
        a, b = read(before), read(now)
        if a.column_names != b.column_names:
            return f"columns {a.column_names} before, {b.column_names} now"
        if len(a) != len(b):
            return f"{len(a):,} rows before, {len(b):,} now"
        for name in a.column_names:
            for row, (x, y) in enumerate(zip(_cells(a, name), _cells(b, name), strict=True)):
                if x != y:
                    return (
                        f"column {name}, first in row {row}: {_short(x)} before, {_short(y)} now{_largest(a, b, name)}"
                    )
        return _first_value(_metadata(a), _metadata(b), "metadata") or (
            None if a.schema.equals(b.schema) else "the columns' types"
        )

    return compare


def _cells(table: pa.Table, name: str) -> Iterator[Any]:
    for chunk in table[name].chunks:
        yield from chunk.to_pylist()


def _largest(a: pa.Table, b: pa.Table, name: str) -> str:
    """By how much a column of numbers, or of lists of numbers, differs."""
    x, y = (table[name].combine_chunks() for table in (a, b))
    while isinstance(x, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        x, y = x.flatten(), y.flatten()
    if len(x) != len(y) or not (pa.types.is_floating(x.type) or pa.types.is_integer(x.type)):
        return ""
    return f"; {_numbers(x.to_numpy(zero_copy_only=False), y.to_numpy(zero_copy_only=False))}"


def _metadata(table: pa.Table) -> dict[str, Any]:
    found = table.schema.metadata or {}
    return {key.decode(): _parsed(value.decode(errors="replace")) for key, value in found.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def _arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _picture(before: Path, now: Path) -> str | None:
    with Image.open(before) as a, Image.open(now) as b:
        if (a.size, a.mode) != (b.size, b.mode):
            return f"{a.size} {a.mode} before, {b.size} {b.mode} now"
        x, y = np.asarray(a), np.asarray(b)
    return None if np.array_equal(x, y) else f"pixels: {_numbers(x, y)}"


BY_SUFFIX: dict[str, Callable[[Path, Path], str | None]] = {
    ".safetensors": _safetensors,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _tables(pq.read_table),
    ".arrow": _tables(_arrow),
    ".png": _picture,
}
