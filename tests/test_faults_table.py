"""docs/faults.md names tests that exist, and says rightly which of them `make test` leaves out."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`( \[A\])?", (ROOT / "docs/faults.md").read_text(encoding="utf-8"))


def test_every_test_of_the_table_exists_and_runs_when_it_says() -> None:
    assert len(NAMED) > 25
    for file, name, acceptance in NAMED:
        head, found, _ = (ROOT / "tests" / file).read_text(encoding="utf-8").partition(f"def {name}(")
        assert found, f"{file}::{name}"
        decorators = head.rpartition("\n\n\n")[2]
        assert ("pytest.mark.acceptance" in decorators) == bool(acceptance), f"{file}::{name}"
