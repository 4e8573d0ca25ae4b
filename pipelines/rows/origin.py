"""Where a state of the repository comes from: commit, what is not committed, DVC experiment and sweep."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

from dino.files import whole_file
from pipelines import paths

FOLDER = "origin"  # of the patch, among a row's artifacts
COMMIT_TAG = "mlflow.source.git.commit"
RESULTS = (":(exclude)dvc.lock", ":(exclude)metrics")  # what stages write: known by the md5s, and no cause of anything
MAX_PATCH_BYTES = 1_000_000
SECRET = re.compile(rb"://[^/@\s]+:[^/@\s]+@")  # an address with a password
BY_ENVIRONMENT = {  # variable -> tag
    "DVC_EXP_NAME": "dvc.exp_name",
    "DVC_EXP_BASELINE_REV": "dvc.exp_baseline_rev",
    "DINO_EXP_REV": "dvc.exp_rev",  # known only when the experiment is done
    "DINO_SWEEP": "dino.sweep",
    "DINO_FLOW_RUN_ID": "prefect.flow_run_id",
}
OUTSIDE = ("data.folder", "pretrain.initial_weights")  # settings that may name files which git does not hold
REPEATING = ("OMP_NUM_THREADS", "DINO_PROCESSES", "DINO_DEVICE")  # variables that change bits


def git(*arguments: str, at: Path = Path()) -> bytes | None:
    """What git prints; None where it fails or there is none."""
    try:
        done = subprocess.run(("git", *arguments), cwd=at, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def words(*arguments: str) -> str:
    """What git prints, as text without the last newline; "" where it fails."""
    return (git(*arguments) or b"").decode(errors="replace").strip()


def uncommitted() -> bytes:
    """Changes of tracked files against HEAD as `git apply` reads them, results left out."""
    return git("diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", ".", *RESULTS) or b""


def untracked() -> list[str]:
    """Files that git neither tracks nor ignores, results left out: no commit and no patch has them."""
    listed = words("ls-files", "--others", "--exclude-standard", "--", ".", *RESULTS)
    return listed.splitlines()


def patch_file(patch: bytes) -> Path:
    """Where a patch lies on this machine, by its md5."""
    return paths.work_dir() / "patches" / f"{hashlib.md5(patch, usedforsecurity=False).hexdigest()}.patch"


def keep(patch: bytes) -> Path:
    """Write a patch to its place."""
    path = patch_file(patch)
    if not path.is_file():
        with whole_file(path) as aside:
            aside.write_bytes(patch)
    return path


def here() -> tuple[dict[str, str], list[Path]]:
    """Tags that say where the state of the working directory comes from, and the patch that the commit lacks."""
    tags = {tag: os.environ[variable] for variable, tag in BY_ENVIRONMENT.items() if os.environ.get(variable)}
    tags |= {f"environment.{name}": os.environ[name] for name in REPEATING if os.environ.get(name)}
    tags["environment.cpus"] = str(os.cpu_count())
    commit = words("rev-parse", "HEAD")
    if not commit:
        return tags, []
    patch, strangers = uncommitted(), untracked()
    tags |= {COMMIT_TAG: commit, "git.dirty": str(bool(patch)).lower()}
    if strangers:
        tags["git.untracked"] = ", ".join(strangers[:20]) + (" ..." if len(strangers) > 20 else "")
    if not patch:
        return tags, []
    if len(patch) > MAX_PATCH_BYTES or SECRET.search(patch):
        why = "it holds an address with a password" if SECRET.search(patch) else f"it has {len(patch):,} bytes"
        return tags | {"git.patch": f"left out: {why}"}, []
    path = keep(patch)
    return tags | {"git.patch": path.name}, [path]
