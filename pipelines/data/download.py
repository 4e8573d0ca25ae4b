"""One file from the network: whole, checked, or not there."""

import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path

from dino.files import whole_file
from pipelines.processes.progress import progress

TIMEOUT_S = 10.0  # without an answer, or between two pieces of it
PIECE_BYTES = 1 << 20


class UnreachableError(Exception):
    """No address gave the file; the text says why, for each."""


def download(urls: Sequence[str], target: Path, check: Callable[[Path], str], *, timeout_s: float = TIMEOUT_S) -> None:
    """Fetch the first of these addresses that works into `target`, unless a good one lies there already.

    Args:
        urls: addresses of the same file.
        target: where it goes; it appears only when it is complete and checked.
        check: file -> "" if it is good, else what is wrong with it.
        timeout_s: an address that keeps silent so long counts as unreachable.

    Raises:
        UnreachableError: no address gave a good file.
    """
    if target.is_file() and not check(target):
        return
    problems = []
    for url in urls:
        try:
            with whole_file(target) as aside:
                _receive(url, aside, timeout_s)
                if wrong := check(aside):
                    raise OSError(wrong)
            return
        except (OSError, HTTPException) as problem:  # URLError and time-outs are OSErrors
            problems.append(f"{url}: {getattr(problem, 'reason', None) or problem or type(problem).__name__}")
    raise UnreachableError("; ".join(problems))


def _receive(url: str, target: Path, timeout_s: float) -> None:
    print(f"fetch: {url}", flush=True)
    request = urllib.request.Request(url, headers={"User-Agent": "dino-pipeline"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer, target.open("wb") as file:
        length = answer.headers.get("Content-Length")
        with progress(f"fetch: {target.stem.strip('.')}", length and int(length), unit="bytes") as advance:
            while piece := answer.read(PIECE_BYTES):
                file.write(piece)
                advance(len(piece))
