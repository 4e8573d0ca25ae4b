"""How long each stage took, outside DVC, in `.work/seconds.json`."""

import json
from contextlib import suppress

from dino.files import whole_file
from pipelines import paths


def note_seconds(name: str, seconds: float) -> None:
    """Remember how long a stage's last real execution took.

    A race, a full disk or a damaged file loses lines of it, never the stage that has just succeeded.
    """
    with suppress(OSError):
        path = paths.work_dir() / "seconds.json"
        with whole_file(path) as aside:
            aside.write_text(json.dumps({**read_seconds(), name: round(seconds, 2)}, indent=2))


def read_seconds() -> dict[str, float]:
    """Seconds of each stage's last real execution on this machine; a stage that the cache brought back has none."""
    try:
        known = json.loads((paths.work_dir() / "seconds.json").read_text(encoding="utf-8"))
        return {str(name): float(seconds) for name, seconds in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not there yet, or damaged: written anew
        return {}
