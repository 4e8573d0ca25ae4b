"""What a real Prefect server holds, asked by HTTP; and commands that use one, as in a plain terminal."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toy import PROJECT

from pipelines.flows.local_server import local_server


def ask(address: str, path: str, **body: Any) -> Any:
    """Answer of a server's API."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def environment(server: str | None, home: Path) -> dict[str, str]:
    """As in a plain terminal; without `server`, a command starts its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names = {"PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1"}
    names |= {"PREFECT_API_URL": server} if server else {}
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")} | names


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server that can be taken away and brought back, with the same address and database."""

    def __init__(self, home: Path):
        self.home, self.port = home, free_port()
        self.address = f"http://127.0.0.1:{self.port}/api"
        self.running = ExitStack()
        self.since = datetime.now(UTC).isoformat()  # runs that were due before do not count

    def start(self) -> None:
        assert self.running.enter_context(local_server(self.home / "server.log", self.port)) == self.address

    def stop(self) -> None:
        self.running.close()

    def runs(self, *states: str) -> list[dict[str, Any]]:
        """Flow runs that began, or were cancelled, by the time they were due; in these states (none named: all)."""
        times = {"after_": self.since, "before_": datetime.now(UTC).isoformat()}
        wanted = {"expected_start_time": times}
        found = ask(self.address, "flow_runs/filter", flow_runs=wanted, sort="EXPECTED_START_TIME_ASC", limit=200)
        due = [run for run in found if run["state_name"] not in ("Scheduled", "Late", "Pending")]
        return [run for run in due if run["state_name"] in states or not states]

    def count(self, *states: str) -> int:
        return len(self.runs(*states))


@contextlib.contextmanager
def started(command: list[str], root: Path, server: Server, log: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command, running in `root`; its words go to the file `log` there."""
    with (root / log).open("ab") as words:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment(server.address, server.home),
            stdout=words,
            stderr=words,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
