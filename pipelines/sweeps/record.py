"""What is known of a sweep, in `.work/sweeps/NAME/`: what it began with, its variants, and why some failed.

Results are not kept here: they are DVC's experiments. This file only says which of them belong together.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dino.files import whole_file
from pipelines import paths
from pipelines.processes.experiment import Base
from pipelines.rows import origin
from pipelines.sweeps.variants import Variant

FILE = "sweep.json"


@dataclass
class Record:
    """A sweep.

    Attributes:
        name: Its name.
        began_with: Commit, and the name of the patch that holds what was not committed.
        variants: {name: settings, state (done, failed, interrupted), reason, seconds, commit}.
    """

    name: str
    began_with: dict[str, str]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Its place."""
        return folder() / self.name

    def log(self, variant: str) -> Path:
        """What a variant said when it was run last."""
        path = self.folder / "logs" / f"{variant}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, variant: str) -> str:
        """The commit of a variant's experiment, or ""."""
        return str(self.variants.get(variant, {}).get("commit", ""))

    def state(self, variant: str) -> str:
        """Of the states that a variant can have; missing: not run yet."""
        return str(self.variants[variant].get("state", "missing"))

    def note(self, variant: str, state: str, **facts: Any) -> None:
        """Write down how a variant went."""
        with self.lock:
            known = self.variants[variant]
            for name in ("reason", "commit", "seconds"):
                known.pop(name, None)
            known |= {"state": state} | {name: value for name, value in facts.items() if value}
            self._write()

    def keep(self) -> None:
        """Write it to its place."""
        with self.lock:
            self._write()

    def _write(self) -> None:
        content = {"began_with": self.began_with, "variants": self.variants}
        with whole_file(self.folder / FILE) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def folder() -> Path:
    """Where sweeps lie."""
    return paths.work_dir() / "sweeps"


def read(name: str) -> Record | None:
    """The record of this name, if there is one.

    Raises:
        ValueError: It is damaged.
    """
    path = folder() / name / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Record(name, dict(content["began_with"]), {k: dict(v) for k, v in content["variants"].items()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}); remove it: experiments that are done are found by their names"
        ) from error


def of(name: str, base: Base, variants: Sequence[Variant]) -> Record:
    """The record of a sweep that is to run: a known one of the same beginning, with these variants added.

    Raises:
        ValueError: One of this name began with another state of the repository.
    """
    began_with = {"commit": base.commit, "patch": origin.patch_file(base.patch).name if base.patch else ""}
    record = read(name) or Record(name, began_with)
    if record.began_with != began_with:
        what = "another commit" if record.began_with["commit"] != base.commit else "other uncommitted changes"
        raise ValueError(
            f"the sweep {name} began with {what}, so its results can't be compared; "
            "choose another --name, or go back (git) to go on with it"
        )
    for variant in variants:
        record.variants.setdefault(variant.name, {"settings": variant.settings})
    return record


def find(name: str | None) -> Record:
    """The sweep of this name, or the one that ran last.

    Raises:
        ValueError: There is none.
    """
    files: Mapping[str, Path] = {path.parent.name: path for path in folder().glob(f"*/{FILE}")}
    if not files:
        raise ValueError(f"no sweep has run here (looked in {folder()})")
    if name is None:
        name = max(files, key=lambda known: files[known].stat().st_mtime)
    record = read(name)
    if record is None:
        close = get_close_matches(name, files, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no sweep {name!r}{hint} There are: {', '.join(sorted(files))}")
    return record
