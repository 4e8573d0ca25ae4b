"""features/KIND.parquet: a row an image (split, id, features), in the order of the tables train, val, test.

The bytes depend on what is written only: row groups have one length, whatever is handed over at once.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dino.files import whole_file
from pipelines import paths
from pipelines.reading import reading

GROUP_ROWS = 4096
FACTS = b"dino"  # metadata: {"kind": ..., "key": of the checkpoint, or null}


class Write(Protocol):
    """Called with up to GROUP_ROWS rows, which become a row group."""

    def __call__(self, split: str, ids: Sequence[str], features_ND: np.ndarray) -> None:
        """Go on; features are float32 or uint8 (255 stands for 1), always of one width and type."""


@contextmanager
def feature_writer(path: Path, *, kind: str, key: str | None) -> Iterator[Write]:
    """A function to write rows with; the file appears when the block ends well."""
    facts = {FACTS: json.dumps({"kind": kind, "key": key}, sort_keys=True).encode()}
    writer: pq.ParquetWriter | None = None
    with whole_file(path) as aside:

        def write(split: str, ids: Sequence[str], features_ND: np.ndarray) -> None:
            nonlocal writer
            assert len(ids) == len(features_ND) <= GROUP_ROWS
            flat = pa.array(features_ND.reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, features_ND.shape[1])
            columns = {"split": pa.array([split] * len(ids)), "id": pa.array(ids, pa.string()), "features": column}
            table = pa.table(columns).replace_schema_metadata(facts)
            if writer is None:
                writer = pq.ParquetWriter(aside, table.schema, compression="zstd", use_dictionary=["split"])
            writer.write_table(table, row_group_size=GROUP_ROWS)

        try:
            yield write
        finally:
            if writer is not None:
                writer.close()


@dataclass(frozen=True)
class Features:
    """A feature file in memory."""

    path: Path
    splits: np.ndarray  # of str
    ids: np.ndarray  # of str
    rows_ND: torch.Tensor  # float32; pixels as 0..1
    key: str | None


def read_key(kind: str) -> str:
    """KEY of the checkpoint that these features come from.

    Raises:
        ValueError: there is no such file, or it is none of ours.
    """
    path = paths.features_file(kind)
    with reading(path, "embed"):
        key = _facts(path, kind)["key"]
        if not isinstance(key, str):
            raise TypeError(f"its key is {key!r}")
    return key


def read_features(kind: str) -> Features:
    """All of features/KIND.parquet.

    Raises:
        ValueError: there is no such file, or it is none of ours.
    """
    path = paths.features_file(kind)
    with reading(path, "embed"):
        key = _facts(path, kind)["key"]
        table = pq.read_table(path, columns=["split", "id", "features"])
        if (found := [str(field.type) for field in table.schema][:2]) != ["string", "string"]:
            raise TypeError(f"split and id are of type {', '.join(found)}")
        column = table.column("features").combine_chunks()
        if not pa.types.is_fixed_size_list(column.type) or column.type.value_type not in (pa.float32(), pa.uint8()):
            raise TypeError(f"features are of type {column.type}")
        if any(part.null_count for part in (*table.columns, column.flatten())):
            raise ValueError("a value is missing")
        values = column.flatten().to_numpy(zero_copy_only=False)
        rows_ND = torch.from_numpy(values.astype(np.float32).reshape(len(table), column.type.list_size))
        if values.dtype == np.uint8:
            rows_ND /= 255
        if not rows_ND.isfinite().all():
            raise ValueError("not all features are finite: has the training diverged?")
        splits, ids = (table.column(name).to_numpy() for name in ("split", "id"))
        if len({*zip(splits, ids, strict=True)}) < len(ids):
            raise ValueError("an image stands there twice")
    return Features(path, splits, ids, rows_ND, key)


def refuse_mixed() -> None:
    """Refuse features of the trained and the untrained network that come from different trainings.

    Raises:
        ValueError: they do, or a file is missing or none of ours.
    """
    trained, untrained = (read_key(kind) for kind in ("trained", "untrained"))
    if trained != untrained:
        raise ValueError(
            f"{paths.features_file('trained')} comes from the training with the key {trained}, "
            f"{paths.features_file('untrained')} from {untrained}; `dvc repro -f -s embed` writes both anew"
        )


def _facts(path: Path, kind: str) -> dict[str, str | None]:
    """What the file says of itself; for a block that reads it."""
    facts = dict(json.loads((pq.read_schema(path).metadata or {})[FACTS]))
    if facts["kind"] != kind:
        raise ValueError(f"it holds the features {facts['kind']!r} under another name")
    return facts
