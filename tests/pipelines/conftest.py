"""Fixtures of the pipeline's tests."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_witness import Creation


@pytest.fixture(scope="session")
def creation(tmp_path_factory: pytest.TempPathFactory) -> Creation:
    """Creating one takes mlflow six seconds of migrations, so it is made once and copied."""
    root = tmp_path_factory.mktemp("mlflow")
    script = "from pipelines.mlflow_store import Store; Store('sqlite:///{}', 'dino')"
    command = [sys.executable, "-W", "ignore", "-c", script.format(root / "mlflow.db")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    words = [process.communicate()[1] for process in both]
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for table in ("experiment_tags", "experiments"):  # its artifacts would lie here
            database.execute(f"delete from {table}")
    return Creation(root / "mlflow.db", words)


@pytest.fixture
def empty_database(creation: Creation) -> Path:
    """A store without experiments, to be copied."""
    return creation.path


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an empty store and nothing else."""
    for name in ("MLFLOW_TRACKING_URI", "DINO_ROOT", "DVC_EXP_NAME", "DINO_FLOW_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path
