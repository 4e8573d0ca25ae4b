"""A real SQLite store for tests, and how to read everything that it holds."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence


@dataclass(frozen=True)
class Creation:
    """A new database that two processes opened at once, and the file of what they said."""

    path: Path
    said: Path


def runs(root: Path, question: str = "") -> list[Any]:
    """The store's runs, oldest first."""
    from pipelines.rows.mlflow_store import Store

    store = Store(f"sqlite:///{root}/mlflow.db", "dino")
    return list(store.client.search_runs([store.experiment_id], question, order_by=["start_time ASC"]))


def everything(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every line of the store's tables that make a row."""
    tables = ("runs", "params", "tags", "metrics", "latest_metrics", "datasets", "inputs", "logged_models",
              "logged_model_metrics", "experiments", "experiment_tags")  # fmt: skip
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        return {name: sorted(database.execute(f"select * from {name}").fetchall(), key=repr) for name in tables}


def curve(root: Path, name: str) -> list[tuple[int, float]]:
    """Logged points of a curve, in the order of steps; a step logged twice stands there twice."""
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        found = database.execute("select step, value from metrics where key = ? order by step", (name,))
        return [(int(step), float(value)) for step, value in found]


def with_uri(uri: str) -> dict[str, Any]:
    """The settings, tracking to `uri`."""
    runtime = evidence.SETTINGS["runtime"]
    return {**evidence.SETTINGS, "runtime": {**runtime, "tracking": {**runtime["tracking"], "uri": uri}}}


@contextlib.contextmanager
def mlflow_server(root: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real server over the store of `root`; (address, process group's leader)."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--artifacts-destination", str(root / "served")]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = (root / "server.log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        patience = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            assert server.poll() is None and time.monotonic() < patience, (root / "server.log").read_text()
            time.sleep(0.1)
        yield address, server
    finally:
        kill(server)
        log.close()


def kill(server: subprocess.Popen[bytes]) -> None:
    """Take the server away as a crash does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
