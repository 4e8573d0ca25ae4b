"""Where a state comes from: commit and patch together are what git knew, and nothing secret leaves."""

import subprocess
from pathlib import Path

import pytest

from pipelines.rows import origin


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*origin.BY_ENVIRONMENT, *origin.REPEATING, "DINO_ROOT"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "root"
    (root / "metrics").mkdir(parents=True)
    for name in ("params.yaml", "dvc.lock", "metrics/knn.json", "binary"):
        (root / name).write_bytes(b"1\n")
    (root / ".gitignore").write_text("/.work/\n")
    monkeypatch.chdir(root)
    for command in ("init -q", "config user.email a@b", "config user.name n", "add -A", "commit -q -m one"):
        subprocess.run(["git", *command.split()], check=True)
    return root


def test_commit_and_patch_are_the_state(repository: Path, tmp_path: Path) -> None:
    Path("params.yaml").write_text("2\n")
    Path("binary").write_bytes(bytes(range(256)))
    Path("new.py").write_text("x = 1\n")
    tags, (patch,) = origin.here()
    assert tags["git.dirty"] == "true" and tags["git.patch"] == patch.name
    assert tags["git.untracked"] == "new.py"
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", repository, clone], check=True)
    for command in (["checkout", "-q", tags[origin.COMMIT_TAG]], ["apply", str(patch)]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    assert (clone / "params.yaml").read_text() == "2\n" and (clone / "binary").read_bytes() == bytes(range(256))


def test_results_are_no_change(repository: Path) -> None:
    for name in ("dvc.lock", "metrics/knn.json", "metrics/new.json"):
        Path(name).write_text("2\n")
    tags, patches = origin.here()
    assert tags["git.dirty"] == "false" and not patches
    assert "git.untracked" not in tags


@pytest.mark.parametrize(
    ("text", "why"),
    [("uri: postgresql://me:secret@host/db\n", "an address with a password"), ("x" * 2_000_000, "bytes")],
)
def test_what_should_not_travel_is_left_out_and_said(repository: Path, text: str, why: str) -> None:
    Path("params.yaml").write_text(text)
    tags, patches = origin.here()
    assert not patches and not (repository / ".work/patches").exists()
    assert tags["git.patch"].startswith("left out: ") and why in tags["git.patch"]
    assert not any("secret" in value for value in tags.values())


def test_outside_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tags, patches = origin.here()
    assert origin.COMMIT_TAG not in tags and not patches


def test_experiment_and_sweep_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "e")
    monkeypatch.setenv("DINO_SWEEP", "s")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    tags, _ = origin.here()
    assert (tags["dvc.exp_name"], tags["dino.sweep"], tags["environment.OMP_NUM_THREADS"]) == ("e", "s", "3")
