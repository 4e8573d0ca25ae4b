"""The suite's order on two workers, its signals and ranks, and the same examples of hypothesis at every run."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# What nohup, or a shell's `&`, made this process ignore, its children would ignore too: they are sent these.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Files of a minute and more: begun last, they leave one worker idle at the end. The longest first.
LONG = ("tests/test_pipeline.py", "tests/benchmarks/test_kill.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; pytest-xdist hands files out in this order (`--no-loadscope-reorder`)."""
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))


@pytest.fixture(scope="session")
def on_two_ranks() -> Iterator[Callable[..., list[Any]]]:
    """What a function gives on each of two gloo ranks: `on_two_ranks(function, *arguments)`."""
    from ranks import Ranks  # imports torch, which most tests of the pipeline do without

    pair = Ranks()
    yield pair
    pair.end()
