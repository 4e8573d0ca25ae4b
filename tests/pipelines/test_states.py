"""States are listed with what refers to them, and dropped only when told, never those in use."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SETTINGS, digits, write_table

from dino.training_state import TrainingState
from pipelines import states
from pipelines.params import load
from pipelines.training.intent import key_here
from pipelines.training.resumable import Resumable

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = {"device": "cpu"}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINO_ROOT", raising=False)
    monkeypatch.setenv("DINO_DEVICE", "cpu")
    write_table(tmp_path / "data/prepared/train.arrow", digits(30))
    set_params()
    return tmp_path


def set_params(**changes: Any) -> str:
    """Write a params.yaml; its KEY."""
    content = yaml.safe_load((PROJECT / "params.yaml").read_text())
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    content["pretrain"] |= settings | changes
    Path("params.yaml").write_text(yaml.safe_dump(content))
    return key_here(load().pretrain)


def saved(key: str, step: int, total_steps: int = 14, days_ago: float = 0) -> Path:
    about = {"total_steps": total_steps, "params": {"arch": "vit_tiny", "patch_size": 4, "epochs": 2}}
    with Resumable(key, ENVIRONMENT, about=about) as resumable:
        resumable.save(TrainingState(step, {"center": torch.zeros(1, 50)}, []))
        then = time.time() - 86400 * days_ago
        os.utime(resumable.newest, (then, then))
    return resumable.folder


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """{KEY: its line} of the printed list."""
    assert states.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if re.match(r"[0-9a-f]{16}\b", line)}


def test_nothing_is_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys) == {}


def test_each_key_with_steps_size_age_and_what_refers_to_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = set_params()
    saved(here, 5)
    saved("a" * 16, 14, days_ago=3)
    (root / "metrics").mkdir()
    (root / "metrics/pretrain.json").write_text(f'{{"key": "{"a" * 16}"}}')
    (saved("b" * 16, 3, days_ago=1) / "state.safetensors").write_bytes(b"cut")
    with Resumable("c" * 16, ENVIRONMENT):
        lines = listed(capsys)
    assert len(lines) == 4 and list(lines)[-1] == "a" * 16  # the last saved first
    assert re.search(r"5 of 14 .* vit_tiny/4 2 epochs +params.yaml would resume it", lines[here])
    assert re.search(r"14 of 14 .* 3 days ago .* finished, its result is metrics/pretrain.json", lines["a" * 16])
    assert re.search(r"unreadable .* unused", lines["b" * 16])
    assert f"process {os.getpid()} on " in lines["c" * 16]
    assert all(re.search(r"\d (bytes|kB)", line) for line in lines.values())


def test_a_state_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    here = set_params()
    folder = saved(here, 5)
    assert states.main(["--drop", here, "--yes"]) == 1
    assert f"states: {here} is in use (params.yaml would resume it): it is not dropped" in capsys.readouterr().err
    other = saved("c" * 16, 5)
    with Resumable("c" * 16, ENVIRONMENT):
        assert states.main(["--drop", "c" * 16, "--yes"]) == 1
        assert states.main(["--drop-unused", "--yes"]) == 0
    assert "trains it): it is not dropped" in capsys.readouterr().err
    assert folder.is_dir() and other.is_dir()


def test_a_finished_one_of_the_current_settings_is_dropped_when_named_only() -> None:
    here = set_params()
    folder = saved(here, 14)
    assert states.main(["--drop-unused", "--yes"]) == 0
    assert folder.is_dir()
    assert states.main(["--drop", here[:6], "--yes"]) == 0
    assert not folder.exists()


def test_unused_ones_go_and_what_is_referred_to_stays(root: Path) -> None:
    here, kept, other = saved(set_params(), 3), saved("a" * 16, 14), saved("b" * 16, 9)
    (root / "metrics").mkdir()
    (root / "metrics/pretrain.json").write_text(f'{{"key": "{kept.name}"}}')
    assert states.main(["--drop-unused", "--yes"]) == 0
    assert (here.is_dir(), kept.is_dir(), other.is_dir()) == (True, True, False)


def test_nothing_goes_unasked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("b" * 16, 9)
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        assert states.main(["--drop", "bb"]) == 1
    assert "nothing was dropped; --yes drops without asking" in capsys.readouterr().err
    assert folder.is_dir()


@pytest.mark.parametrize(("key", "said"), [("f", "no state has a key that begins with 'f'"), ("b", "2 states have")])
def test_an_unclear_key_is_refused(key: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved("b" * 16, 1), saved("b" * 15 + "c", 1)
    assert states.main(["--drop", key, "--yes"]) == 1
    assert said in capsys.readouterr().err


def test_a_changed_setting_that_comes_back_finds_its_own_state() -> None:
    before = set_params()
    folder = saved(before, 5)
    other = set_params(lr_at_256=0.06)
    assert other != before and not (folder.parent / other).exists()
    assert set_params() == before
