"""World(rank, size, device): one process is n = 1 of the general case. The one home of torch.distributed.

How many processes there are is environment (torchrun's variables), never a parameter; no other file asks
whether a process group exists.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dino.memory import keep_freed_memory


def _choose_device(size: int, local_rank: int) -> torch.device:
    """DINO_DEVICE if set, else cuda, mps or cpu by what is there; each rank of a machine its own GPU.

    Raises:
        ValueError: DINO_DEVICE is not a device that is here, or there are more ranks than GPUs.
    """
    wanted = os.environ.get("DINO_DEVICE", "")
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if wanted not in ("", "cpu", "cuda", "mps"):
        raise ValueError(f"DINO_DEVICE is {wanted!r}; choose cpu, cuda or mps, or unset it")
    if (wanted == "cuda" and not cuda) or (wanted == "mps" and not mps):
        raise ValueError(f"DINO_DEVICE is {wanted!r}, but torch finds no such device; unset it to use what is there")
    if wanted == "mps" and size > 1:
        raise ValueError("DINO_DEVICE is 'mps', which serves one process only; start one process, or set it to cpu")
    if wanted == "cuda" or (not wanted and cuda):
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own, torch finds {torch.cuda.device_count()}; "
                "start at most that many processes (torchrun --nproc-per-node), or set DINO_DEVICE=cpu"
            )
        return torch.device("cuda", local_rank)
    if wanted == "mps" or (not wanted and mps and size == 1):
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def _the_others() -> Iterator[None]:
    """A block that needs every rank.

    Raises:
        ConnectionError: One of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this run has ended; its own words say why. What was saved stays: run the same command "
            f"again to go on ({str(error).strip().partition(chr(10))[0][:200]})"
        ) from error


@dataclass(frozen=True)
class World:
    """The processes that work on one thing: this one's rank, how many there are, and where this one computes.

    Every rank must call the same collective operations in the same order. With one rank each returns its
    argument's own memory: do not write into a result.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def detect(cls) -> "World":
        """What torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK) says, or a world of one; joins nothing.

        Raises:
            ValueError: the device that was asked for is not there, or there are more ranks than GPUs.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=size,
            device=_choose_device(size, int(os.environ.get("LOCAL_RANK", "0"))),
        )

    @classmethod
    @contextmanager
    def start(cls) -> Iterator["World"]:
        """The detected world with its ranks joined (NCCL on CUDA, gloo elsewhere), left again at the end."""
        world = cls.detect()
        if world.device.type == "cpu":
            keep_freed_memory()
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        if world.size == 1:
            yield world
            return
        on_cuda = world.device.type == "cuda"
        dist.init_process_group(  # tensors on the CPU travel by gloo, so that questions need not wait for a GPU
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", device_id=world.device if on_cuda else None
        )
        try:
            yield world
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """This rank's contiguous share of `count` rows; shares in rank order are all rows once."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a tensor of one shape everywhere, without gradient."""
        if self.size == 1:
            return values.detach()
        total = values.detach().clone()
        with _the_others():
            dist.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a floating-point tensor of one shape everywhere, without gradient."""
        total = self.sum(values)
        return total / self.size if self.size > 1 else total

    def any(self, *answers: bool) -> list[bool]:
        """Whether each holds on any rank; asks the processes, not their devices."""
        if self.size == 1:
            return list(answers)
        return (self.sum(torch.tensor(answers, dtype=torch.int32)) > 0).tolist()

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [n_r, ...] of every rank, in rank order, on every rank; the counts n_r may differ."""
        if self.size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        with _the_others():
            dist.all_gather(counts, count)
        lengths = [int(n) for n in counts]
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _the_others():
            dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with _the_others():
                dist.barrier()
