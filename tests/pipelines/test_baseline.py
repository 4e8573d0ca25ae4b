"""What an experiment is called: the settings that differ from the committed ones."""

import copy
import subprocess
from pathlib import Path

import evidence
import pytest
import yaml

from pipelines.rows import baseline, row


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of these settings."""
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(evidence.SETTINGS))
    for command in ("init -q", "config user.email a@b", "config user.name n", "add params.yaml", "commit -q -m one"):
        subprocess.run(["git", *command.split()], check=True)


@pytest.mark.usefixtures("committed")
def test_a_row_is_called_by_what_differs_from_its_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = copy.deepcopy(evidence.SETTINGS)
    assert baseline.differences(settings) == {}
    assert row.run_name(settings["pretrain"], {}) == "vit_tiny/4 64x3 5 epochs"
    settings["pretrain"] |= {"lr_at_256": 0.5, "seed": 3}
    settings["data"] |= {"folder": "photos"}
    settings["knn"] |= {"temperature": 0.5}  # of the evaluation: a row below this one
    found = baseline.differences(settings)
    assert found == {"data.folder": "photos", "pretrain.lr_at_256": "0.5", "pretrain.seed": "3"}
    monkeypatch.setenv("DVC_EXP_NAME", "exp-1")
    assert row.run_name(settings["pretrain"], found) == "data.folder=photos, seed=3, lr_at_256=0.5 (exp-1)"


@pytest.mark.usefixtures("committed")
def test_where_no_commit_tells_nothing_differs() -> None:
    settings = copy.deepcopy(evidence.SETTINGS)
    settings["pretrain"]["lr_at_256"] = 0.5
    subprocess.run(["git", "rm", "-q", "params.yaml"], check=True)
    subprocess.run(["git", "commit", "-q", "-m", "two"], check=True)
    assert baseline.differences(settings) == {}
