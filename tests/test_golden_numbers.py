"""No array of tests/golden lies there unread: the golden tests, run with a note of what they take out of the files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
NOTE = """
import os
import golden_numbers

class Noted(dict):
    def __getitem__(self, key):
        with open(os.environ["NOTED"], "a") as file:
            print(self.name, key, file=file)
        return super().__getitem__(key)

read = golden_numbers.Golden.__init__

def reads(self, name):
    read(self, name)
    self.arrays = Noted(self.arrays)
    self.arrays.name = name

golden_numbers.Golden.__init__ = reads
"""


@pytest.mark.acceptance
def test_every_golden_array_is_read_by_a_test(tmp_path: Path) -> None:
    (tmp_path / "note_reads.py").write_text(NOTE)
    noted = tmp_path / "noted.txt"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{TESTS / 'dino'}", "NOTED": str(noted)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "note_reads", "-p", "no:cacheprovider", "tests/dino",
               "-k", "golden", f"--basetemp={tmp_path / 'base'}"]  # fmt: skip
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    there = {f"{file.stem} {key}" for file in (TESTS / "golden").glob("*.npz") for key in np.load(file).files}
    assert len(there) > 300
    assert there - set(noted.read_text().splitlines()) == set()
