"""What a stage says of a fault: one clear error, a failing exit code, and nothing lost or overwritten."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.processes.stage import EXIT_ERROR, run_stage


def tree(root: Path) -> dict[str, str]:
    """md5 of every file below, but for the work folder, whose locks and logs come and go."""
    files = [path for path in root.rglob("*") if path.is_file() and ".work" not in path.relative_to(root).parts]
    return {str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def ended(stage: str, main: Callable[[Any], None]) -> int:
    """Run a stage in this process; its exit code."""
    try:
        run_stage(stage, main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def told(stage: str, main: Callable[[Any], None], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a stage that fails in `root`, the current directory; refuses any other end."""
    before = tree(root)
    code = ended(stage, main)
    words = capsys.readouterr().err
    assert code == EXIT_ERROR, words
    assert words.count(f"{stage} failed: ") == 1 and "Traceback" not in words, words
    assert tree(root) == before
    return words.partition(f"{stage} failed: ")[2]
