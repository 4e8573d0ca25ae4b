"""A Prefect server on this machine for as long as one command needs it.

Prefect's own ephemeral server is a plain child: Ctrl-C in the terminal takes it away before the flow has reported its
last state, and kill -9 of the flow leaves it running. Under our warden it stays to the end, and no longer. It uses
the same database as `prefect server start`, so that earlier runs are seen in its pages.
"""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipelines.processes import runner

START_SECONDS = 300.0  # a first start makes the database: 10 s idle, a minute and more where all cores are busy
GRACE_SECONDS = 5.0


@contextlib.contextmanager
def local_server(log: Path, port: int = 0) -> Iterator[str]:
    """Start a server on 127.0.0.1; yields its API's address, and ends it afterwards.

    Args:
        log: file for the server's own words; overwritten.
        port: where it should listen; 0, or one that is in use: any free one.

    Raises:
        OSError: the server ended at once, or does not answer.
    """
    port = _free_port(port)
    log.parent.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    env["PREFECT_SERVER_UI_API_URL"] = address  # else its pages ask port 4200
    with log.open("wb") as words:
        server = runner.start_warded(command, grace_seconds=GRACE_SECONDS, env=env, stdout=words.fileno())
    try:
        _wait_for(address, server, log)
        yield address
    finally:
        runner.close(server)
        server.wait()


def _free_port(wanted: int) -> int:
    """`wanted` if it is free, else any that is."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended just now is no hindrance
        try:
            free.bind(("127.0.0.1", wanted))
        except OSError:
            free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(address: str, server: subprocess.Popen[str], log: Path) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(f"{address}/health"):
            return
        time.sleep(0.1)
    last = "".join(f"\n    {line}" for line in log.read_text(errors="replace").strip().splitlines()[-5:])
    raise OSError(
        f"Prefect's server on 127.0.0.1 {'ended at once' if server.poll() else 'does not answer'}; its last words "
        f"(all in {log}):{last}\n`dvc repro` runs the same stages without a server"
    )
