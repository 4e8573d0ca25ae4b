"""A group's servers and people on one machine, from the commands of docs/team.md alone."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from recital import commands, with_values

from pipelines.processes.runner import close, start_warded

ROOT = Path(__file__).parents[2]
PAGE = commands(ROOT / "docs/team.md")
START_SECONDS = 240.0  # MLflow's and Prefect's first starts make their tables; some 20 s on an idle machine
ANSWERS = {  # the port of each server, and a page that says it is well
    "postgres": ("PGPORT", ""),
    "s3": ("S3_PORT", ""),
    "mlflow": ("MLFLOW_PORT", "/health"),
    "prefect": ("PREFECT_PORT", "/api/health"),
}
OURS = ("DINO_", "MLFLOW_", "DVC_", "PREFECT_", "AWS_", "PG", "GIT_")


def missing() -> str:
    """Why this can't run here, with the command that mends it, or ""."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return "PostgreSQL is not installed here: sudo apt-get install postgresql"
    if not (Path(sys.executable).parent / "moto_server").exists():
        return "moto's S3 is not installed here: pip install -r requirements-team.txt"
    return ""


def free_ports(number: int) -> list[int]:
    """So many ports of 127.0.0.1 that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Team:
    """Servers and people below one folder; leaving it ends every process."""

    def __init__(self, folder: Path):
        """Write team.env and secrets.env into `folder`, with ports and passwords of this evening."""
        self.folder, self.servers = folder, ExitStack()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        names = [port for port, _ in ANSWERS.values()]
        self.ports = {name: str(port) for name, port in zip(names, free_ports(len(names)), strict=True)}
        addresses, words = PAGE["Settings"]
        (folder / "team.env").write_text(with_values(addresses, {"TEAM": str(folder), **self.ports}))
        words = re.sub(r"\.\.\.", lambda _: secrets.token_urlsafe(24), words)
        (folder / "secrets.env").touch(mode=0o600)
        (folder / "secrets.env").write_text(words)
        self.secrets = dict(re.findall(r"(\w+)=(\S+)", words))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.servers.close()

    def command(self, block: str, *, postgres: bool = False) -> list[str]:
        """A block as bash runs it; where we are root, PostgreSQL's as the user of Debian's package."""
        bash = ["bash", "-euo", "pipefail", "-c", f"source {self.folder}/team.env\n{block}"]
        return ["runuser", "-u", "postgres", "--", *bash] if postgres and os.getuid() == 0 else bash

    def environment(self, person: str, known: Mapping[str, str]) -> dict[str, str]:
        """A person's own: home, name, and the secrets that this person knows."""
        home = self.folder / person
        home.mkdir(exist_ok=True)
        outside = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        git = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER")
               for what, value in (("NAME", person), ("EMAIL", f"{person}@localhost"))}  # fmt: skip
        ours = {"PATH": path, "HOME": str(home), "USER": person, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        patient = {"DO_NOT_TRACK": "true", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}  # not 5 s: this machine may be busy
        return {**outside, **git, **ours, **patient, **known}

    def admin(self) -> dict[str, str]:
        """The administrator's environment: every secret."""
        return self.environment("admin", self.secrets)

    def start(self, name: str, block: str, *, postgres: bool = False) -> None:
        """Start a server that runs until the evening ends."""
        with (self.folder / f"{name}.log").open("wb") as words:
            command = self.command(block, postgres=postgres)
            server = start_warded(command, grace_seconds=10, env=self.admin(), stdout=words.fileno())
        self.servers.callback(lambda: (close(server), server.wait()))
        self.processes[name] = server

    def wait_for(self, name: str) -> None:
        """Return when a server that was started answers.

        Raises:
            AssertionError: it ended, or does not answer in time; with its last words.
        """
        port, page = ANSWERS[name]
        until = time.monotonic() + START_SECONDS
        while not answers(self.ports[port], page):
            last = "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-20:])
            assert self.processes[name].poll() is None, f"{name} ended:\n{last}"
            assert time.monotonic() < until, f"{name} does not answer:\n{last}"
            time.sleep(0.2)

    def run(self, block: str, environment: Mapping[str, str], into: str, *, postgres: bool = False, cwd: Path) -> str:
        """Run a block to its end; what it said, which also stands in the folder's file `into`.

        Raises:
            AssertionError: it failed; with its words.
        """
        done = subprocess.run(
            self.command(block, postgres=postgres), env=environment, cwd=cwd, text=True, timeout=540,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with (self.folder / into).open("a") as log:
            log.write(done.stdout)
        assert done.returncode == 0, f"{block}\nfailed ({done.returncode}):\n{done.stdout}"
        return done.stdout


def answers(port: str, path: str) -> bool:
    """Whether a server listens; and, where it has a page for that, says that it is well."""
    try:
        if not path:
            socket.create_connection(("127.0.0.1", int(port)), timeout=2).close()
            return True
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
            return True
    except urllib.error.HTTPError as refused:  # it wants a password: it is there
        return refused.code in (401, 403)
    except OSError:
        return False


@contextmanager
def servers(folder: Path) -> Iterator[Team]:
    """PostgreSQL, S3, MLflow and Prefect, each as docs/team.md starts it."""
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    with Team(folder) as team:
        initdb, postgres, roles, pgpass = PAGE["PostgreSQL"]
        moto, buckets = PAGE["S3"]
        mlflow, people = PAGE["MLflow"]
        (prefect,) = PAGE["Prefect"]
        admin = team.admin()
        team.run(initdb, admin, "initdb.said", postgres=True, cwd=folder)
        team.start("postgres", postgres, postgres=True)
        team.start("s3", moto)
        team.wait_for("postgres")
        team.run(roles, admin, "roles.said", postgres=True, cwd=folder)
        team.run(pgpass, admin, "pgpass.said", cwd=folder)
        team.start("mlflow", mlflow)
        team.start("prefect", prefect)
        team.wait_for("s3")
        team.run(buckets, admin, "buckets.said", cwd=folder)
        team.wait_for("mlflow")
        team.run(people, admin, "people.said", cwd=folder)
        team.wait_for("prefect")
        yield team
