"""The file of `pipelines.embed`: a row an image (id, path, features), and in its metadata what they come from.

The bytes depend on what is written only: row groups have one length, whatever is handed over at once.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dino.files import whole_file

GROUP_ROWS = 4096
FACTS = b"dino"


class Embedded(NamedTuple):
    """A file in memory."""

    ids: list[str]
    paths: list[str]  # relative to the folder, with /
    rows_ND: torch.Tensor  # float32
    facts: dict[str, Any]


def rows_table(ids: list[str], paths: list[str], features_ND: np.ndarray) -> pa.Table:
    """Rows as a table: id, path, features (a list of fixed length, float32)."""
    features = pa.FixedSizeListArray.from_arrays(pa.array(features_ND.reshape(-1)), features_ND.shape[1])
    return pa.table({"id": pa.array(ids, pa.string()), "path": pa.array(paths, pa.string()), "features": features})


def write_embedded(path: Path, tables: Iterable[pa.Table], facts: dict[str, Any]) -> None:
    """Write the tables of `rows_table`, one after the other; the file appears whole or not at all."""
    metadata = {FACTS: json.dumps(facts, sort_keys=True)}
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    with whole_file(path) as aside:
        for table in tables:
            schema = table.schema.with_metadata(metadata)
            writer = writer or pq.ParquetWriter(aside, schema, compression="zstd", use_dictionary=False)
            together = pa.concat_tables([*waiting, table]).cast(schema)
            whole_groups = len(together) // GROUP_ROWS * GROUP_ROWS
            if whole_groups:
                writer.write_table(together.slice(0, whole_groups), row_group_size=GROUP_ROWS)
            waiting = [together.slice(whole_groups).replace_schema_metadata(None)]
        assert writer is not None, "a file without tables has no schema"
        writer.write_table(pa.concat_tables(waiting).cast(schema), row_group_size=GROUP_ROWS)
        writer.close()


def read_facts(path: Path) -> dict[str, Any]:
    """What the features of a file come from.

    Raises:
        ValueError: there is no such file, or `pipelines.embed` did not write it.
    """
    if not path.is_file():
        raise ValueError(f"no {path}; `python -m pipelines.embed FOLDER --out {path}` writes it")
    try:
        facts = dict(json.loads((pq.read_schema(path).metadata or {})[FACTS]))
        facts["checkpoint_md5"], facts["folder"]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as problem:
        raise ValueError(f"{path} is no file of `python -m pipelines.embed` ({problem!r}); name another") from problem
    return facts


def read_embedded(path: Path) -> Embedded:
    """All of a file.

    Raises:
        ValueError: there is no such file, or it is not whole, or `pipelines.embed` did not write it.
    """
    facts = read_facts(path)
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as problem:
        raise ValueError(f"{path} is damaged ({problem}); remove it and embed again") from problem
    values = table.column("features").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows_ND = torch.from_numpy(values.reshape(len(table), -1).copy())
    return Embedded(table.column("id").to_pylist(), table.column("path").to_pylist(), rows_ND, facts)
