"""`python -m pipelines.ui` (`make ui`): MLflow's pages, on this machine only unless asked, opened on our experiment."""

import argparse
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines import paths
from pipelines.processes import warden
from pipelines.rows import row, view
from pipelines.rows.tracking import open_store, tracking_uri, without_secrets

HOST, ANY = "127.0.0.1", "0.0.0.0"
PORT = 5000
PORTS_TRIED = 20
START_SECONDS = 300.0  # some 8; a busy machine takes its time
GRACE_SECONDS = 5.0


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warning(host: str, port: int) -> str:
    """What a person should know who opens the pages to a network."""
    return (
        f"WARNING: {host} is not this machine only. Whoever reaches port {port} can read, change and delete every "
        "experiment: MLflow asks for no password. From elsewhere rather use a tunnel, and no --host: "
        f"ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
    )


def free_port(wanted: int | None, host: str = HOST) -> int:
    """`wanted` if it is free; if nothing is wanted, the first free port from 5000 on.

    Raises:
        ValueError: `wanted` is in use, or this machine has no such address.
    """
    for port in range(PORT, PORT + PORTS_TRIED) if wanted is None else (wanted,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended just now is no hindrance
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                    raise ValueError(f"--host {host}: this machine has no such address; leave it out") from error
                continue
    if wanted is None:
        raise ValueError(f"ports {PORT} to {PORT + PORTS_TRIED - 1} are all in use; name a free one: --port 6000")
    raise ValueError(f"port {wanted} is in use; end what listens there, or name another: --port {wanted + 1}")


@contextmanager
def served(uri: str, port: int, host: str = HOST) -> Iterator[str]:
    """MLflow's server for the database at `uri`, as long as the block lasts; yields its address once it answers.

    Raises:
        ValueError: it ended, or did not answer in time; the message ends with its last words.
    """
    artifacts = (paths.real_root() / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifacts, "--uvicorn-opts", "--log-level=warning"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    database = {"MLFLOW_BACKEND_STORE_URI": uri}  # every user of the machine can read a command line
    log = paths.work_dir() / "ui.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+", encoding="utf-8") as words:
        server = subprocess.Popen(
            [sys.executable, "-I", "-S", warden.__file__, str(GRACE_SECONDS), *command],
            stdin=subprocess.PIPE,  # the warden ends the server when this closes, so also when we are killed
            stdout=words,
            stderr=words,
            env={**os.environ, **quiet, **database},
            start_new_session=True,
        )
        try:
            address = f"http://{HOST if host == ANY else host}:{port}"
            patience = time.monotonic() + START_SECONDS
            while not _answers(address):
                late = time.monotonic() > patience
                if late or server.poll() is not None:
                    words.seek(0)
                    last = "\n    ".join(words.read().strip().splitlines()[-5:])
                    what = f"did not answer at {address} in {START_SECONDS:.0f} s" if late else "ended"
                    raise ValueError(f"MLflow's server {what}; its last words ({log}):\n    {last}")
                time.sleep(0.1)
            yield address
        finally:
            server.communicate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


def show(params: Any, *, host: str, port: int | None, browser: bool) -> None:
    """Serve and say where; until interrupted. A tracking server elsewhere is only opened."""
    uri = tracking_uri(row.plain(params)["runtime"]["tracking"]["uri"])
    if uri.startswith("http"):
        _tell(view.address(uri, open_store(params).experiment_id), browser)
        return
    chosen = free_port(port, host)
    if not is_local(host):
        print(warning(host, chosen), file=sys.stderr, flush=True)
    if port is None and chosen != PORT:
        print(f"Port {PORT} is in use, so this is port {chosen}.")
    print("Starting MLflow's pages, which takes some seconds ...", flush=True)
    experiment = open_store(params).experiment_id  # makes a new database, before the server would
    with served(uri, chosen, host) as address:
        _tell(view.address(address, experiment), browser)
        print("Ctrl-C ends it.", flush=True)
        signal.pause()


def _tell(address: str, browser: bool) -> None:
    print(f"Experiments: {without_secrets(address)}", flush=True)
    if browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(address)


def main() -> int:
    """Run the command."""
    from pipelines.params import load

    parser = argparse.ArgumentParser(prog="python -m pipelines.ui", description=__doc__)
    parser.add_argument("--host", default=HOST, help=f"address to serve at (default {HOST}: this machine only)")
    parser.add_argument("--port", type=int, help=f"its port (default: the first free one from {PORT} on)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        show(load(), host=chosen.host, port=chosen.port, browser=not chosen.no_browser)
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # mlflow's errors, the network's, ours: the user needs the line, not the trace
        print(f"ui: {without_secrets(str(error).strip())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
