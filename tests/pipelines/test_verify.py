"""Stages run anew in a scratch copy of a real repository: identical, or what differs and by how much."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.verify import main

PROJECT = Path(__file__).parents[2]

# DVC's own use of pygtrie
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

FIRST = """
import json, pathlib
pathlib.Path("made").mkdir()
pathlib.Path("made/numbers.json").write_text(json.dumps({"loss": 1.5, "steps": 4}))
print("first has run")
"""
SECOND = """
import json, os, pathlib, time
time.sleep(float(os.environ.get("SLOW", "0")))
loss = json.loads(pathlib.Path("made/numbers.json").read_text())["loss"]
pathlib.Path("score.json").write_text(json.dumps({"score": loss + float(os.environ.get("CHANCE", "0"))}))
pathlib.Path("same.txt").write_text("same")
print("second has run")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which `dvc repro` has run."""
    root = tmp_path_factory.mktemp("repository")
    stages = {
        "first": {"cmd": "python first.py", "deps": ["first.py"], "outs": ["made"]},
        "second": {"cmd": "python second.py", "deps": ["second.py", "made"], "outs": ["same.txt"]},
        "third": {"cmd": "touch third.txt", "outs": ["third.txt"]},
    }
    stages["second"]["metrics"] = [{"score.json": {"cache": False}}]
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (root / "params.yaml").write_text("runtime:\n  tracking:\n    enabled: true\n")
    (root / "first.py").write_text(FIRST)
    (root / "second.py").write_text(SECOND)
    (root / ".gitignore").write_text(
        ".work/\n/made\n/same.txt\n/third.txt\n/.dvc/cache\n/.dvc/tmp\n/.dvc/config.local\n"
    )
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    repro = [sys.executable, "-P", "-m", "dvc", "repro", "first", "second"]
    subprocess.run(repro, cwd=root, check=True, env=environment, capture_output=True)
    return root


@pytest.fixture(autouse=True)
def here(ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ran)
    monkeypatch.delenv("DINO_ROOT", raising=False)
    return ran


def everything(root: Path) -> dict[str, bytes]:
    """Every file that a verification must leave alone: not DVC's own notes."""
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files if ".dvc/tmp" not in str(file) and ".git/" not in str(file)}


def test_identical_outs_are_said_after_every_stage_was_executed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "note.txt").write_text("an uncommitted file: the tree may be dirty")
    before = everything(here)
    assert main(["first", "second"]) == 0
    said = capsys.readouterr().out
    assert "first has run" in said and "second has run" in said
    assert "verify: first executed in" in said and "verify: second executed in" in said
    assert said.splitlines()[-1] == "verify: 2 stages executed, all 3 outs are identical to dvc.lock"
    assert everything(here) == before
    assert not list((here / ".work").glob("verify/*"))


def test_a_difference_is_named_with_its_size(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(here)
    monkeypatch.setenv("CHANCE", "0.25")
    assert main(["second"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "verify: second: score.json differs: score: 1.5 before, 1.75 now, by 0.25" in said
    assert said[-1] == "verify: 1 stage executed, 1 of 2 outs differ from dvc.lock"
    assert everything(here) == before


def test_one_stage_runs_alone_on_what_it_needs_and_the_copy_is_kept_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["second", "--keep"]) == 0
    said = capsys.readouterr().out
    assert "first has run" not in said and "second has run" in said
    (kept,) = (here / ".work/verify").iterdir()
    assert str(kept) in said
    assert json.loads((kept / "score.json").read_text()) == {"score": 1.5}
    assert yaml.safe_load((kept / "params.yaml").read_text())["runtime"]["tracking"]["enabled"] is False
    shutil.rmtree(here / ".work/verify")


def test_a_stage_that_never_ran_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert capsys.readouterr().err == (
        "verify: dvc.lock holds no result of third to compare with; `dvc repro` makes one\n"
    )


def test_an_unknown_stage_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["secnd"]) == 1
    assert "dvc.yaml has no stage 'secnd'; did you mean second?" in capsys.readouterr().err


def test_what_dvc_lock_does_not_hold_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: (here / file).read_text() for file in ("second.py", "score.json")}
    (here / "second.py").write_text(SECOND + "\n")
    (here / "score.json").write_text("{}")
    try:
        assert main(["second"]) == 1
    finally:
        for file, content in before.items():
            (here / file).write_text(content)
    told = capsys.readouterr().err
    assert "second: second.py is modified" in told and "second: score.json is modified" in told
    assert "`dvc repro` brings results up to date" in told


def test_a_failing_stage_fails_with_its_words(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHANCE", "much")
    assert main(["second"]) == 1
    told = capsys.readouterr()
    assert "could not convert string to float: 'much'" in told.out
    assert "verify: second was not executed but failed" in told.err
    assert not list((here / ".work").glob("verify/*"))


@pytest.mark.acceptance  # test_runner.py and test_ending.py tell what it is made of
def test_interrupted_it_ends_the_stage_and_removes_the_copy(here: Path) -> None:
    before = everything(here)
    environment = {**os.environ, "SLOW": "60", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "pipelines.verify", "second"]
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while "> python second.py" not in process.stdout.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 75
        assert process.stderr.read().startswith("interrupted by SIGTERM; nothing half-written stays")
    assert not list((here / ".work").glob("verify/*"))
    assert everything(here) == before
