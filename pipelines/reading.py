"""Files of results, read with distrust: one that is damaged or foreign is named, with its cure."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DAMAGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, NotImplementedError)


@contextmanager
def reading(path: Path, stage: str) -> Iterator[None]:
    """A block that reads `path`, which `stage` writes, and whatever is made of it.

    Raises:
        ValueError: there is no such file, or what the block found in it made it fail.
        OSError: the file may not be read.
    """
    if not path.is_file():
        raise ValueError(f"no {path}; `dvc repro {stage}` writes it")
    try:
        yield
    except Exception as problem:  # readers of damaged files raise what they like, Arrow its own
        of_the_system = isinstance(problem, OSError) and problem.errno is not None
        if of_the_system or isinstance(problem, MemoryError):
            raise
        first_line = str(problem).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{path} is damaged, or not what the stage {stage} writes ({type(problem).__name__}: {first_line}); "
            f"`dvc repro -f -s {stage}` writes it anew"
        ) from problem


def read_metrics(path: Path, stage: str, *needed: str) -> dict[str, Any]:
    """A file of metrics, which holds at least the names `needed`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    with reading(path, stage):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        if missing := [name for name in needed if name not in values]:
            raise KeyError(f"lacks {', '.join(missing)}")
    return values
