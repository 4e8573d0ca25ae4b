"""How a benchmark measures: contestants by turns in one process, ratios pair by pair, one JSON line with its recipe.

Times on shared machines swing by a factor of two within minutes; two things timed one right after the other share
most of that, so a ratio is the median over pairs, and times stand beside it for orientation only.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PRODUCT_SIDE = 2048
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIBRARIES = ("torch", "torchvision", "numpy", "pyarrow", "pillow", "scikit-learn", "lightly")


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def by_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    clock: str = "wall",
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each contestant, a call each a round, A B C A B C ..., after `warm_up` rounds that do not count.

    Args:
        contestants: what to call, by name.
        rounds: calls of each that count.
        device: waited for before and after each call.
        clock: "wall", or "cpu": seconds that this process computed, the steadier one with one thread on busy cores.
        warm_up: rounds before.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        for name, call in contestants.items():
            wait(device)
            began = now()
            result = call()
            wait(device)
            if number >= 0:
                seconds[name].append(result if isinstance(result, Seconds) else now() - began)
    return seconds


class Seconds(float):
    """What a contestant took by its own clock."""


class Apart:
    """A contestant in a process of its own, as its users would run it: nothing that ours sets up helps it."""

    def __init__(self, build: Callable[..., Callable[[], object]], *arguments: object, clock: str = "wall") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, clock, build, arguments), daemon=True).start()

    def __call__(self) -> Seconds:
        """One turn."""
        self._pipe.send(None)
        return Seconds(self._pipe.recv())


def _serve(pipe: Any, clock: str, build: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> None:
    call = build(*arguments)
    with suppress(EOFError):  # the asker has ended
        while True:
            pipe.recv()
            began = CLOCKS[clock]()
            call()
            pipe.send(CLOCKS[clock]() - began)


def summary(values: list[float]) -> dict[str, Any]:
    """Median, how many, and the quartiles as spread (with fewer than four values, the extremes)."""
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 3 else (ordered[0], 0, ordered[-1])
    return {"median": statistics.median(ordered), "n": len(ordered), "spread": [low, high]}


def ratios(seconds: Mapping[str, list[float]], ours: str) -> dict[str, dict[str, Any]]:
    """How many times as long as ours each other contestant takes, pair by pair."""
    return {
        name: {"seconds": statistics.median(values)}
        | {"times_ours": summary([other / own for other, own in zip(values, seconds[ours], strict=True)])}
        for name, values in seconds.items()
        if name != ours
    }


def product(device: torch.device, side: int = PRODUCT_SIDE) -> tuple[Callable[[], object], int]:
    """A square product of fp32, and how many floating-point operations it has."""
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the worst moment of a call, beyond those that lived before it."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_1min": load,
    }


def processor() -> str:
    """The processor's own name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def emit(benchmark: str, settings: Mapping[str, Any], device: torch.device, results: Mapping[str, Any]) -> None:
    """Print everything as one line of JSON, numbers to four digits."""
    line = {"benchmark": benchmark, **settings, **results, "hardware": hardware(device), "versions": versions()}
    print(json.dumps(_short(line)), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return value
