"""`python -m pipelines.serve --cron "0 3 * * *"` (or `--every 15m`): ticks by the clock, until Ctrl-C.

A tick is a flow run in a process of its own (pipelines/tick.py). Prefect's server keeps the schedule: the one that
PREFECT_API_URL names, else one of our own. While nobody serves, the schedule is paused.

Exit code: 0 after Ctrl-C or TERM, 1 when it could not begin.
"""

import argparse
import asyncio
import logging
import re
import signal
import socket
import sys
import time
import zoneinfo
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.schemas.schedules import CronSchedule
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.types.entrypoint import EntrypointType

from pipelines import paths
from pipelines.flow import INTERRUPTED, run_command, server_of_our_own
from pipelines.processes.graph import stage_graph
from pipelines.tick import tick

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
ASK_SECONDS = 2.0  # the server is asked for due ticks this often
PATIENCE_SECONDS = 10.0  # between attempts where no server answers
RETRIES = 8  # of each question, 2 s and then ever longer apart: together 8 minutes without a server
SERVER_PORT = 4200  # of our own server; another one if it is in use


def interval(text: str) -> timedelta:
    """`30s`, `15m`, `6h` or `1d` as a time.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"--every {text!r}: choose a number and s, m, h or d, such as 15m")
    return timedelta(seconds=float(found[1]) * SECONDS[found[2]])


def time_zone(name: str | None) -> str:
    """A zone that schedules know: `name`, else this machine's own, else UTC.

    Raises:
        ValueError: There is no such zone.
    """
    if name is None:
        name = str(Path("/etc/localtime").resolve()).partition("zoneinfo/")[2] or "UTC"
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"--timezone {name!r}: no such zone; choose one such as Europe/Berlin or UTC") from error
    return name


def schedule(cron: str | None, every: str | None, zone: str) -> Schedule:
    """The schedule, by either way of naming times.

    Raises:
        ValueError: The words name no times.
    """
    if every is not None:
        return Interval(interval(every), timezone=zone)
    try:
        CronSchedule(cron=str(cron), timezone=zone)
    except ValueError as error:
        raise ValueError(
            f'--cron {cron!r}: no times; it takes minute, hour, day, month and weekday: "0 3 * * *" is 3:00 each night'
        ) from error
    return Cron(str(cron), timezone=zone)


def deployment_name() -> str:
    """Of this working directory on this machine: two that share a server must not overwrite each other."""
    return re.sub(r"[^\w.-]", "-", f"{paths.real_root().name}-{socket.gethostname()}")


def serve(times: Schedule, name: str, *, queue: bool) -> None:
    """Run ticks as they come due, each in a process of its own, until interrupted.

    Args:
        times: The schedule.
        name: The deployment's.
        queue: A tick that comes due while one runs waits for it; else it is cancelled.

    Raises:
        Exception: The server was away for minutes.
    """
    runner = Runner(
        name=name,
        query_seconds=ASK_SECONDS,
        prefetch_seconds=0,  # a tick that begins before it is due would meet the one before it
        limit=1 if queue else 2,  # the second is the tick that finds the first one running, and is cancelled
    )
    deployment: Any = tick.to_deployment(
        name, schedule=times, entrypoint_type=EntrypointType.MODULE_PATH, tags=["dino"]
    )
    runner.add_deployment(deployment)
    runner.handle_sigterm = lambda *_: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign] # in order, too
    asyncio.run(runner.start())


def serve_for_good(times: Schedule, name: str, *, queue: bool) -> None:
    """Serve until interrupted; while the server is away, wait for it."""
    # That overdue ticks wait while one runs, said anew every two seconds of a training of days.
    logging.getLogger("prefect.runner").addFilter(lambda record: "at capacity" not in record.getMessage())
    told = False
    while True:
        try:
            serve(times, name, queue=queue)
            return
        except Exception as error:  # httpx's, in groups of anyio's: whatever it was, the next night wants its tick
            if not told:
                print(f"serve: no server ({_first_line(error)}); trying again", file=sys.stderr, flush=True)
            told = True
            time.sleep(PATIENCE_SECONDS)


def _first_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error).strip().split("\n")[0] or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.serve", description="Ticks by the clock, until Ctrl-C")
    times = parser.add_mutually_exclusive_group(required=True)
    times.add_argument("--cron", metavar='"M H D M W"', help='times as cron names them: "0 3 * * *" is 3:00 each night')
    times.add_argument("--every", metavar="TIME", help="30s, 15m, 6h, 1d")
    parser.add_argument("--timezone", metavar="ZONE", help="whose clock, as Europe/Berlin (default: this machine's)")
    parser.add_argument("--queue", action="store_true", help="a tick due while one runs waits; default: cancelled")
    parser.add_argument("--name", default=deployment_name(), help="the deployment's name (default: %(default)s)")
    options = parser.parse_args(arguments)

    def work() -> int:
        from pipelines.params import load

        chosen = schedule(options.cron, options.every, time_zone(options.timezone))
        load()
        stage_graph()  # what is wrong here is better told now than at night
        server_of_our_own(SERVER_PORT)
        when = f"every {options.every}" if options.every else f'by "{options.cron}" in {chosen.timezone}'
        pages = str(PREFECT_API_URL.value()).removesuffix("/api")
        print(f"Ticks {when}; pages: {pages}/deployments. Ctrl-C ends it.", flush=True)
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: RETRIES}):
            serve_for_good(chosen, options.name, queue=options.queue)
        return 0

    code = run_command(work)
    return 0 if code == INTERRUPTED else code


if __name__ == "__main__":
    sys.exit(main())
