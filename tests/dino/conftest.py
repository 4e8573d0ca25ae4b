"""What the tests of the method share."""

from collections.abc import Callable

import pytest
from golden_numbers import Golden


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    return Golden
