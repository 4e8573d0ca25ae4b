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
    return str(_facts(paths.features_file(kind))["key"])


def read_features(kind: str) -> Features:
    """All of features/KIND.parquet.

    Raises:
        ValueError: there is no such file, or it is none of ours.
    """
    path = paths.features_file(kind)
    key = _facts(path)["key"]
    table = pq.read_table(path)
    column = table.column("features").combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    rows_ND = torch.from_numpy(values.astype(np.float32).reshape(len(table), -1))
    if values.dtype == np.uint8:
        rows_ND /= 255
    splits, ids = (table.column(name).to_numpy() for name in ("split", "id"))
    return Features(path, splits, ids, rows_ND, key)


def _facts(path: Path) -> dict[str, str | None]:
    if not path.is_file():
        raise ValueError(f"no {path}; `dvc repro embed` writes it")
    try:
        return dict(json.loads((pq.read_schema(path).metadata or {})[FACTS]))
    except (pa.ArrowException, OSError, KeyError, ValueError) as problem:
        raise ValueError(
            f"{path} is no feature file ({problem!r}); `dvc repro -f -s embed` writes it anew"
        ) from problem
