"""Laws of World: ranks share all rows once, collectives equal the plain computation, one process is n = 1."""

import os
import time
from typing import Any

import pytest
import torch
from ranks import Ranks

from dino.distributed import World


def found_together(world: World) -> dict[str, Any]:
    mine = torch.arange(5.0)[:, None].repeat(1, 2)[list(world.rows(5))]
    found = {
        "rank": world.rank,
        "size": world.size,
        "device": world.device.type,
        "sum": world.sum(torch.tensor([1.0 + world.rank, 10.0])).tolist(),
        "mean": world.mean(torch.tensor([1.0 + world.rank, 10.0])).tolist(),
        "rows": world.gather_rows(mine).tolist(),
        "integers": world.gather_rows(torch.full((world.rank,), 7)).tolist(),
    }
    world.barrier()
    return found


def world_of(size: int, rank: int) -> World:
    return World(rank, size, torch.device("cpu"))


@pytest.mark.parametrize("count", [0, 1, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_all_rows_once_in_order(count: int, size: int) -> None:
    shares = [world_of(size, rank).rows(count) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    rows = torch.rand(3, 2)
    with World.start() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert torch.equal(world.sum(rows), rows)
        assert torch.equal(world.mean(rows), rows)
        assert torch.equal(world.gather_rows(rows), rows)
        world.barrier()
        assert not torch.distributed.is_initialized()


def test_two_gloo_ranks_equal_the_plain_computation(on_two_ranks) -> None:
    assert on_two_ranks(found_together) == [
        {
            "rank": rank,
            "size": 2,
            "device": "cpu",
            "sum": [3.0, 20.0],
            "mean": [1.5, 10.0],
            "rows": [[float(row)] * 2 for row in range(5)],
            "integers": [7],
        }
        for rank in range(2)
    ]


def fail_on_the_second(world: World) -> None:
    if world.rank == 1:
        raise KeyError("a rank's own words")
    world.barrier()


def die_on_the_second(world: World) -> None:
    if world.rank == 1:
        os._exit(3)
    time.sleep(1000)


def wait_on_the_second(world: World) -> None:
    if world.rank == 1:
        time.sleep(1000)


def test_a_rank_that_fails_dies_or_is_late_fails_its_test_and_no_other() -> None:
    """Of the ranks that all these tests share."""
    ranks = Ranks(max_seconds=60)
    for function, words in ((fail_on_the_second, 'rank 1: Traceback(.|\n)*KeyError: "a rank\'s own words"'),
                            (die_on_the_second, "rank 1: it ended with 3")):  # fmt: skip
        with pytest.raises(AssertionError, match=words):
            ranks(function)
    assert [found["rank"] for found in ranks(found_together)] == [0, 1]
    ranks.max_seconds = 0.1
    with pytest.raises(AssertionError, match=r"no answer of rank \[1\] in 0\.1 s"):
        ranks(wait_on_the_second)
    assert not ranks.processes


@pytest.mark.parametrize("wanted", ["gpu", "cuda:1"])
def test_an_unknown_device_is_named_with_its_cure(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_DEVICE", wanted)
    with pytest.raises(ValueError, match=r"DINO_DEVICE.*choose cpu, cuda or mps"):
        World.detect()


def test_more_ranks_than_gpus_is_an_error_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINO_DEVICE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "100")
    monkeypatch.setenv("LOCAL_RANK", "99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"rank 99.*torch finds 1.*DINO_DEVICE=cpu"):
        World.detect()
