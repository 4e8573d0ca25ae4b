"""A scratch copy of this repository: the working tree as it stands, its own git and DVC store, nothing computed yet."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines import params, paths

OWN_STORE = "[cache]\n    dir = cache\n"  # whatever .dvc/config says, and relative to .dvc/


def copy_repository(into: Path, settings: Mapping[str, Mapping[str, Any]] | None = None, root: Path = Path()) -> None:
    """Copy what git tracks or does not ignore, without dvc.lock and metrics/, and commit it there.

    Args:
        into: The new repository's folder; made, or empty.
        settings: {section: {name: value}} of params.yaml that shall differ there.
        root: Of the repository that is copied.

    Raises:
        ValueError: `root` is not in a git repository.
    """
    for name in _files(root):
        if name != "dvc.lock" and not name.startswith("metrics/"):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, into / name)
    params.rewrite(into / paths.PARAMS, settings or {})
    (into / ".dvc/config.local").write_text(OWN_STORE)
    author = ("-c", "user.name=scratch", "-c", "user.email=scratch@localhost")
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "--no-verify", "-m", "scratch"]):
        subprocess.run(["git", *command], cwd=into, check=True, env=without_git())


def _files(root: Path) -> Iterable[str]:
    """Regular files of the working tree that git knows or would take in."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, env=without_git())
    if listed.returncode:
        raise ValueError(
            f"{root.resolve()} is in no git repository ({listed.stderr.strip()}); go to the project's root"
        )
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def without_git() -> dict[str, str]:
    """The environment without what a git hook sets: it would point back to the repository that is copied."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
