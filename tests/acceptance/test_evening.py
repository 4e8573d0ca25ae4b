"""The scripted evening of tests/acceptance/evening.py; what it tells is shown, as a person is to read it."""

import shutil
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
from evening import evening

pytestmark = pytest.mark.acceptance


def test_an_evening(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="dino-evening-"))
    with capsys.disabled():
        print()
        evening(folder, lambda line: print(f"{datetime.now():%H:%M:%S}  {line}" if line else "", flush=True))
    shutil.rmtree(folder, ignore_errors=True)
