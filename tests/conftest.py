"""The order of the suite on two workers, and the same examples of hypothesis at every run."""

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Files of a minute and more: begun last, they leave one worker idle at the end. The longest first.
LONG = ("tests/test_pipeline.py", "tests/benchmarks/test_kill.py", "tests/pipelines/test_launch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; pytest-xdist hands files out in this order (`--no-loadscope-reorder`)."""
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))
