"""What `pipelines.trace` prints, for rows that know everything and for rows that don't; acceptance runs it for real."""

import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines import trace
from pipelines.rows import origin
from pipelines.rows.mlflow_store import Row, Store
from pipelines.rows.row import TEACHER_TAG, EvaluationContent

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own


@pytest.fixture
def repository(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a store, and a change that is not committed."""
    for name in (*origin.BY_ENVIRONMENT, *origin.REPEATING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trace, "cache_and_remote", lambda: ("/cache", None))
    Path(".gitignore").write_text("/.work/\n/mlflow.db*\n/mlartifacts/\n")
    Path("params.yaml").write_text("knn: {temperature: 0.07}\npretrain: {lr_at_256: 0.1, epochs: 5}\n")
    for command in ("init -q", "config user.email a@b", "config user.name n", "add -A", "commit -q -m one"):
        subprocess.run(["git", *command.split()], check=True)
    return home


def store(home: Path) -> Store:
    return Store(f"sqlite:///{home / 'mlflow.db'}", "dino")


def row(home: Path, **more: str) -> Row:
    made = store(home).row("k", "a name")
    made.add_params({"pretrain.lr_at_256": "0.5", "pretrain.epochs": "5"})
    tags, patches = origin.here()
    made.add_origin(tags | more, patches)
    return made


def lines(one: Row, md5: str = "d" * 32) -> tuple[str, list[list[str]]]:
    """What is said to people, and the commands."""
    said = list(trace.script(one, md5, anew=False, folder="/clone"))
    comments = "\n".join(line for line in said if line.startswith("#"))
    return comments, [shlex.split(line, comments=True) for line in said if not line.startswith("#")]


def test_a_clean_row_is_its_commit(repository: Path) -> None:
    comments, commands = lines(row(repository))
    assert "Nothing was uncommitted." in comments
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert ["git", "checkout", "--quiet", "--detach", head] in commands and ["dvc", "repro"] in commands
    assert ["echo", "d" * 32 + "  models/teacher.safetensors", "|", "md5sum", "-c"] in commands


def test_what_was_not_committed_comes_from_the_row_where_this_machine_has_lost_it(repository: Path) -> None:
    Path("params.yaml").write_text("knn: {temperature: 0.07}\npretrain: {lr_at_256: 0.5, epochs: 5}\n")
    Path("new.py").write_text("")
    one = row(repository)
    (kept,) = (repository / ".work/patches").iterdir()
    text = kept.read_bytes()
    kept.unlink()
    comments, commands = lines(one)
    assert "UNCOMMITTED then: params.yaml; the row keeps the difference" in comments
    assert "NOT KNOWN to git then, so lost unless you have it: new.py" in comments
    (apply,) = (command for command in commands if command[:2] == ["git", "apply"])
    assert Path(apply[2]).read_bytes() == text


def test_a_lost_difference_is_said_and_the_settings_come_from_the_row(repository: Path) -> None:
    Path("params.yaml").write_text("knn: {temperature: 0.07}\npretrain: {lr_at_256: 0.5, epochs: 5}\n")
    comments, commands = lines(row(repository, **{"git.patch": "left out: it has 9 bytes"}), md5="")
    assert "UNCOMMITTED then, and lost: changes of tracked files (it has 9 bytes)" in comments
    assert "UNKNOWN: the md5 of models/teacher.safetensors" in comments
    assert ["dvc", "exp", "run", "-S", "pretrain.lr_at_256=0.5"] in commands
    assert ["dvc", "repro"] not in commands


def test_a_commit_that_is_not_here_is_said(repository: Path) -> None:
    comments, commands = lines(row(repository, **{origin.COMMIT_TAG: "f" * 40, "host": "there"}))
    assert f"UNKNOWN here: commit {'f' * 40}; fetch it from where it was made (host there)" in comments
    assert commands == [["dvc", "exp", "run", "--temp", "-S", "pretrain.lr_at_256=0.5"]]


def test_environment_that_changes_bits_is_set_or_told(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_PROCESSES", "2")
    one = row(repository, **{"environment.OMP_NUM_THREADS": "3", "versions.torch": "0.1"})
    one.tags.pop("environment.DINO_PROCESSES")
    comments, commands = lines(one)
    assert ["export", "OMP_NUM_THREADS=3"] in commands and ["unset", "DINO_PROCESSES"] in commands
    assert "OTHER here: torch 0.1 then" in comments


def test_a_row_is_found_by_id_beginning_name_or_experiment(repository: Path) -> None:
    made = row(repository, **{"dvc.exp_name": "e"})
    store(repository).row("k2", "another")
    rows = store(repository).rows()
    assert len(rows) == 2
    for wanted in (made.run_id, made.run_id[:6], "a name", "e"):
        assert trace.find(rows, wanted).run_id == made.run_id
    for wanted in ("", "x", made.run_id[:2]):
        with pytest.raises(ValueError, match="no row"):
            trace.find(rows, wanted)
    with pytest.raises(ValueError, match="'a name' fits 2 rows"):
        trace.find([*rows, *rows], "a name")


def test_a_checkpoint_is_the_rows_own_or_that_of_the_row_above_and_no_other(repository: Path) -> None:
    opened = store(repository)
    training, failed = opened.row("k", "trained"), opened.row("l", "failed")
    training.add_tags({TEACHER_TAG: "a" * 32})
    child = opened.child(training, "k", EvaluationContent("e", {}), "other settings")
    stray = opened.child(failed, "m", EvaluationContent("f", {}), "of a training that is gone")
    stray.add_tags({TEACHER_TAG: "b" * 32})
    rows = [stray, child, failed, training]
    assert [trace.teacher_md5(one, rows) for one in (training, child, failed)] == ["a" * 32, "a" * 32, ""]
