"""Fixtures of the pipeline's tests."""

import contextlib
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_witness import Creation

# Says what it finds, and becomes two processes that open one new database at once.
TWO_AT_ONCE = """
import os, sys
from pipelines import sync, ui
from pipelines.rows import row, tracking, view, workspace
print("imports mlflow:", any(name.split(".")[0] == "mlflow" for name in sys.modules))
from pipelines.rows.mlflow_store import Store
from mlflow.telemetry.client import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
print("sends something home:", not is_telemetry_disabled() or get_telemetry_client() is not None, flush=True)
other = os.fork()
Store("sqlite:///mlflow.db", "dino")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0)
"""


@pytest.fixture(scope="session")
def creation(tmp_path_factory: pytest.TempPathFactory) -> Creation:
    """Creating one takes mlflow ten seconds of imports and migrations: made once for all workers, and copied."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "mlflow"
    root.mkdir(exist_ok=True)
    made = Creation(root / "empty.db", root / "said.txt")
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.path.exists():
            # of its own environment: under pytest, or in CI, mlflow sends nothing in any case
            env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": str(Path(__file__).parents[2])}
            with made.said.open("w") as said:
                command = [sys.executable, "-W", "ignore", "-c", TWO_AT_ONCE]
                subprocess.run(command, cwd=root, env=env, stdout=said, stderr=said)
            with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
                for table in ("experiment_tags", "experiments"):  # its artifacts would lie here
                    database.execute(f"delete from {table}")
            (root / "mlflow.db").rename(made.path)
    return made


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
