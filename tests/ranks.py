"""Two gloo ranks that serve all tests of a session: starting a pair for each costs more than what they compute.

That torchrun starts such ranks is for tests/pipelines/test_launch.py to say.
"""

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dino.distributed import World

RANKS = 2
SLOW_TO_IMPORT = ["torch", "torchvision", "pytest"]  # once, by the server that forks the ranks
MAX_SECONDS = 120


class Ranks:
    """Calls a function on every rank, as `function(world, *arguments)`, and gives what each returned, in rank order.

    The function must stand in a module, of which the ranks have the name only. The first call starts the ranks. A
    rank that fails ends the pair, since the other may wait for it for ever; the next call starts another.
    """

    def __init__(self, max_seconds: float = MAX_SECONDS) -> None:
        self.max_seconds = max_seconds
        self.processes: list[Any] = []
        self.lines: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call it.

        Raises:
            AssertionError: With the traceback of the rank that failed, or of no answer in time.
        """
        if not self.processes:
            self._start()
        task = pickle.dumps((Path.cwd(), function, arguments))
        for line in self.lines:
            line.send_bytes(task)
        try:
            return self._answers(time.monotonic() + self.max_seconds)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Have none left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for line in self.lines:
            line.close()
        self.processes, self.lines = [], []

    def _start(self) -> None:
        forks = get_context("forkserver")
        forks.set_forkserver_preload(SLOW_TO_IMPORT)
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(RANKS):
            ours, theirs = forks.Pipe()
            process = forks.Process(target=serve, args=(rank, self.store.port, theirs, sys.dont_write_bytecode))
            process.start()
            theirs.close()  # so that the death of its owner shows
            self.processes.append(process)
            self.lines.append(ours)

    def _answers(self, deadline: float) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < RANKS:
            waiting = [line for rank, line in enumerate(self.lines) if rank not in found]
            ready = connection.wait(waiting, max(deadline - time.monotonic(), 0))
            assert ready, f"no answer of rank {[self.lines.index(line) for line in waiting]} in {self.max_seconds} s"
            for line in ready:
                rank = self.lines.index(line)  # type: ignore[arg-type]
                try:
                    failure, found[rank] = pickle.loads(self.lines[rank].recv_bytes())
                except EOFError:
                    self.processes[rank].join()
                    failure = f"it ended with {self.processes[rank].exitcode}"
                assert not failure, f"rank {rank}: {failure}"
        return [found[rank] for rank in range(RANKS)]


def serve(rank: int, port: int, line: Connection, dont_write_bytecode: bool) -> None:
    """Be this rank, until the line breaks."""
    sys.dont_write_bytecode = dont_write_bytecode
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "DINO_DEVICE": "cpu",
        # the store that the tests' process holds, as torchrun's does
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    with World.start() as world:
        while True:
            try:
                task = line.recv_bytes()
            except EOFError:
                return
            line.send_bytes(pickle.dumps(answer(world, task)))


def answer(world: World, task: bytes) -> tuple[str, Any]:
    """The traceback, or nothing, and what the function gave."""
    try:
        folder, function, arguments = pickle.loads(task)
        os.chdir(folder)
        return "", function(world, *arguments)
    except BaseException:
        return traceback.format_exc(), None
