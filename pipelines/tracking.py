"""One door for metrics: JSON first, then MLflow. JSON files and dvc.lock are the truth; MLflow is a view."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_metrics(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write `values` as JSON that depends on them only: sorted keys, indent 2, floats as they are.

    The file appears whole: written aside, flushed to the disk, renamed. Parent folders are created.

    Raises:
        ValueError: a number is NaN or infinite; the message names its place.
        TypeError: a value or a key that JSON does not know.
    """
    path = Path(path)
    if place := _not_finite(values):
        raise ValueError(
            f"{path}: {place} is not a finite number, so it is no result; "
            "find where it arises (a diverged training?), or leave it out"
        )
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _not_finite(value: Any, place: str = "") -> str:
    """Place of the first NaN or infinity inside `value` ("trained.val_by_k.5"), or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return place or "the value"
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for key, item in inner:
        if found := _not_finite(item, f"{place}.{key}" if place else str(key)):
            return found
    return ""
