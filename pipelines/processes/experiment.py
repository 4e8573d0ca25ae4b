"""One DVC experiment in a clone of the repository that shares its cache; the user's working tree is not touched.

`dvc exp run --temp` makes such clones too, but takes the state of the working tree at the moment each one starts (an
edit meanwhile would enter the later ones), stashes it for that moment, and two that start together can take each
other's place. Here all experiments of a sweep begin with the state that was there when the sweep was first started.
"""

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import paths
from pipelines.processes.runner import child_environment, close, start_warded, tell
from pipelines.processes.warden import END, HURRY
from pipelines.rows import origin

GRACE_SECONDS = 60.0  # between TERM, on which a trainer saves, and KILL
LAST_LINES = 40


@dataclass(frozen=True)
class Base:
    """What every experiment of a sweep begins with.

    Attributes:
        commit: HEAD.
        patch: What was not committed, as `git apply` reads it.
        dvc_settings: Text of the clones' .dvc/config.local.
    """

    commit: str
    patch: bytes
    dvc_settings: str

    def reference(self, name: str) -> str:
        """Git's name of an experiment."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}/{name}"

    def done(self) -> dict[str, str]:
        """{name: commit} of the experiments that stand on this commit."""
        prefix = self.reference("")
        listed = origin.words("for-each-ref", "--format=%(refname) %(objectname)", prefix.rstrip("/"))
        pairs = (line.rsplit(" ", 1) for line in listed.splitlines())
        return {reference.removeprefix(prefix): commit for reference, commit in pairs}


def make_clone(base: Base, folder: Path, needed: Sequence[str]) -> None:
    """A clone in `folder` with the base's state.

    Args:
        base: The state.
        folder: Must not exist.
        needed: Paths of settings (a folder of images, weights); what git and DVC don't bring is linked.

    Raises:
        ValueError: git refuses.
    """
    root = Path.cwd()
    identity = [
        part
        for name in ("user.name", "user.email")
        if (value := origin.words("config", name))
        for part in ("-c", f"{name}={value}")
    ]
    _git(root, "clone", "--quiet", "--no-checkout", *identity, str(root), str(folder))
    _git(folder, "checkout", "--quiet", "--detach", base.commit)
    if base.patch:
        _git(folder, "apply", "--whitespace=nowarn", str(origin.keep(base.patch)))
    (folder / ".dvc/config.local").write_text(base.dvc_settings, encoding="utf-8")
    for path in needed:
        inside = folder / path
        if (
            (root / path).exists()
            and not Path(path).is_absolute()
            and not os.path.lexists(inside)
            and paths.RAW not in Path(path).parents
        ):
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(root / path)


def bring_home(base: Base, folder: Path, name: str) -> None:
    """Take an experiment over from its clone.

    Raises:
        ValueError: git refuses.
    """
    reference = base.reference(name)
    _git(Path.cwd(), "fetch", "--quiet", "--no-write-fetch-head", str(folder), f"{reference}:{reference}")


def _git(at: Path, *arguments: str) -> None:
    done = subprocess.run(("git", *arguments), cwd=at, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise ValueError(f"git {arguments[0]} failed: {said}")


def remove_clone(folder: Path) -> None:
    """Remove it; what DVC protects too."""
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Commands:
    """Runs commands under wardens, several at once from threads; `end` ends them all."""

    ending: bool = False
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(
        self, command: Sequence[str], folder: Path, env: Mapping[str, str], on_line: Callable[[str], None]
    ) -> tuple[int, list[str]]:
        """Run `python COMMAND...` in a folder; its exit code and last lines."""
        process = start_warded(
            [sys.executable, *command],
            grace_seconds=GRACE_SECONDS,
            env=child_environment(env),
            stdout=subprocess.PIPE,
            cwd=folder,
        )
        self.running.append(process)
        if self.ending:
            tell(process, END)
        last_lines: deque[str] = deque(maxlen=LAST_LINES)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if text := line.rstrip():
                    last_lines.append(text)
                    on_line(text)
        finally:
            tell(process, END)  # it has ended already, unless a line could not be taken
            code = process.wait()
            self.running.remove(process)
            close(process)
        return code, [*last_lines]

    def end(self, hurry: bool = False) -> None:
        """Ask all to end, and start nothing any more."""
        self.ending = True
        for process in [*self.running]:
            tell(process, HURRY if hurry else END)
