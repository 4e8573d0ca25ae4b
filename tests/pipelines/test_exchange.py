"""What a tick exchanges with the world, by real DVC commands on a toy."""

import pytest
from dvc.cli import main as dvc_command
from toy import repository

from pipelines.flows import exchange
from pipelines.processes.graph import outside
from pipelines.processes.runner import Outcome, StageRunner

# DVC's own use of pygtrie
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")


def dvc(*arguments: str) -> None:
    """A command of DVC in the working directory."""
    assert dvc_command(["-q", *arguments]) == 0


def test_imports_are_updated_missing_data_comes_from_the_remote_and_results_go_there(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "1.txt").write_text("one")
    root = repository(tmp_path / "toy", {"a": ([], "")})
    monkeypatch.chdir(root)
    said: list[str] = []
    with StageRunner() as runner:
        assert exchange.bring_in(runner, outside(), "photos", said.append).outcome is Outcome.UNCHANGED
        assert exchange.push(runner, outside(), said.append).outcome is Outcome.UNCHANGED
        assert "photos is watched where it lies" in said[0]

        dvc("import-url", str(source), "data")
        dvc("remote", "add", "--default", "shared", str(tmp_path / "shared"))
        found = outside()
        assert (found.remote, found.imports, found.missing) == ("shared", ("data.dvc",), ())
        assert exchange.bring_in(runner, found, "data", said.append).outcome is Outcome.UNCHANGED
        assert exchange.push(runner, found, said.append).outcome is Outcome.RAN
        assert exchange.push(runner, found, said.append).outcome is Outcome.UNCHANGED

        (source / "2.txt").write_text("two")
        assert exchange.bring_in(runner, found, "data", said.append).outcome is Outcome.RAN
        assert (root / "data/2.txt").read_text() == "two"

        dvc("push")
        for path in (root / "data", root / ".dvc/cache"):
            path.rename(tmp_path / path.name)
        assert outside().missing == ("data.dvc",)
        assert exchange.bring_in(runner, outside(), "data", said.append).outcome is Outcome.RAN
        assert (root / "data/2.txt").read_text() == "two"

        source.rename(tmp_path / "away")
        failed = exchange.bring_in(runner, outside(), "data", said.append)
        assert failed.outcome is Outcome.FAILED
        assert failed.rerun == "dvc update data.dvc"
