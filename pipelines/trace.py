"""`python -m pipelines.trace RUN`: the commands that bring back the state behind a row of MLflow, in a new clone.

RUN is the run's id or its beginning, its name, or its DVC experiment's. Lines that begin with # are for people, so that
`python -m pipelines.trace RUN > back.sh; sh -e back.sh` runs the rest. What lies here is not touched; what is unknown
or was never committed is said.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import params, paths
from pipelines.processes.graph import cache_and_remote
from pipelines.processes.stage import run_command
from pipelines.recipe import differences
from pipelines.rows import origin
from pipelines.rows.origin import COMMIT_TAG
from pipelines.rows.row import CHILD_OF_TAG, KEY_TAG, TEACHER_TAG
from pipelines.rows.tracking import open_store
from pipelines.sweeps.variants import nested

if TYPE_CHECKING:  # mlflow costs two seconds
    from pipelines.rows.mlflow_store import Row


@dataclass(frozen=True)
class Source:
    """Where the state is: a commit here, and a patch upon it.

    Attributes:
        commit: Of the experiment, which holds everything, or the one that was checked out; "" if there is none here.
        patch: Changes that it lacks.
        exact: Whether both together are all that git knew of.
        words: What a person should know of it.
    """

    commit: str
    patch: Path | None
    exact: bool
    words: list[str]


def find(rows: "Sequence[Row]", wanted: str) -> "Row":
    """The row with this id, beginning of an id, name, or experiment.

    Raises:
        ValueError: None, or several.
    """
    for fits in (
        lambda one: one.run_id == wanted,
        lambda one: len(wanted) >= 4 and one.run_id.startswith(wanted),
        lambda one: wanted in (one.name, one.tags.get("dvc.exp_name")),
    ):
        found = [one for one in rows if fits(one)]
        if len(found) == 1:
            return found[0]
        if found:
            which = ", ".join(f"{one.run_id[:8]} ({one.name})" for one in found[:5])
            raise ValueError(f"{wanted!r} fits {len(found)} rows: {which}; name one by its id")
    newest = ", ".join(f"{one.run_id[:8]} ({one.name})" for one in rows[:3])
    raise ValueError(f"no row {wanted!r} in MLflow" + (f"; the newest: {newest}" if rows else ", which is empty"))


def here(commit: str) -> bool:
    """Whether this repository holds a commit."""
    return bool(commit) and origin.git("cat-file", "-e", f"{commit}^{{commit}}") is not None


def source(one: "Row") -> Source:
    """Where the state of a row is."""
    tags, words = one.tags, []
    if name := tags.get("dvc.exp_name"):
        if here(tags.get("dvc.exp_rev", "")):
            return Source(tags["dvc.exp_rev"], None, True, [f"The DVC experiment {name} holds all of it."])
        if "dvc.exp_rev" in tags:
            words.append(
                f"The DVC experiment {name} is not here (`dvc exp pull REMOTE {shlex.quote(name)}` brings it)."
            )
    commit = tags.get(COMMIT_TAG, "")
    if not commit:
        return Source("", None, False, [*words, "UNKNOWN: the row names no commit; it was written outside git."])
    if not here(commit):
        words.append(f"UNKNOWN here: commit {commit}; fetch it from where it was made (host {tags.get('host', '?')}).")
        return Source("", None, False, words)
    if tags.get("git.dirty") != "true":
        return Source(commit, None, True, [*words, "Nothing was uncommitted."])
    patch = patch_of(one)
    if patch:
        changed = ", ".join(files_of(patch))
        return Source(commit, patch, True, [*words, f"UNCOMMITTED then: {changed}; the row keeps the difference."])
    why = tags.get("git.patch", "an older version wrote the row").removeprefix("left out: ")
    words.append(f"UNCOMMITTED then, and lost: changes of tracked files ({why}). What follows sets the row's settings.")
    return Source(commit, None, False, words)


def references(commit: str) -> list[str]:
    """Git's names of the experiments at a commit; a clone does not bring them by itself."""
    named = origin.words("for-each-ref", "--format=%(refname)", f"--points-at={commit}", "refs/exps").split()
    return [name for name in named if not name.startswith("refs/exps/exec/")]


def patch_of(one: "Row") -> Path | None:
    """The row's patch: as it lies on this machine, or fetched."""
    name = one.tags.get("git.patch", "")
    if not name.endswith(".patch"):
        return None
    folder = paths.work_dir() / "patches"
    if (folder / name).is_file():
        return folder / name
    fetched = one.fetch_file(f"{origin.FOLDER}/{name}", folder)
    return fetched.replace(folder / name) if fetched else None


def files_of(patch: Path) -> list[str]:
    """The files that a patch changes."""
    lines = patch.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rpartition(" b/")[2] for line in lines if line.startswith("diff --git ")]


def settings_of(one: "Row") -> dict[str, Any]:
    """The settings that a row says, by section."""
    return nested({name: params.value(text) for name, text in one.params.items() if "." in name})


def teacher_md5(one: "Row", rows: "Sequence[Row]") -> str:
    """MD5 of a row's checkpoint, which a row of other evaluation settings has from the one above it; or ""."""
    above = (row for row in rows if CHILD_OF_TAG in one.tags and row.tags.get(KEY_TAG) == one.tags[CHILD_OF_TAG])
    return next((row.tags[TEACHER_TAG] for row in (one, *above) if TEACHER_TAG in row.tags), "")


def script(one: "Row", md5: str, *, anew: bool, folder: str) -> Iterator[str]:
    """The lines.

    Args:
        one: The row.
        md5: Of its checkpoint, or "".
        anew: Compute everything, instead of taking it from this repository's cache or the remote.
        folder: The clone's.
    """
    known = source(one)
    part = "".join(f", {what} {one.tags[tag]}" for tag, what in NAMED.items() if tag in one.tags)
    yield f"# {one.name} (run {one.run_id}{part})"
    yield "# In the activated environment, anywhere:"
    yield from (f"# {line}" for line in known.words)
    if strangers := one.tags.get("git.untracked"):
        yield f"# NOT KNOWN to git then, so lost unless you have it: {strangers}"
    yield from (f"# {line}" for line in other_environment(one.tags))
    settings = settings_of(one)
    if not known.commit:
        yield "# So nothing brings exactly this back. Its settings, upon what lies here:"
        yield shlex.join(["dvc", "exp", "run", "--temp", *overrides(params.read(paths.PARAMS), settings)])
        return
    yield shlex.join(["git", "clone", "--quiet", str(paths.real_root()), folder])
    yield shlex.join(["cd", folder])
    for reference in references(known.commit):
        yield shlex.join(["git", "fetch", "--quiet", "origin", f"{reference}:{reference}"])
    yield f"git checkout --quiet --detach {known.commit}"
    if known.patch:
        yield shlex.join(["git", "apply", str(known.patch.resolve())])
    yield from links(settings)
    yield from variables(one.tags)
    if not anew:
        cache, remote = cache_and_remote()
        yield shlex.join(["dvc", "cache", "dir", "--local", cache])
        if remote:
            yield "dvc pull --allow-missing --run-cache || true  # what is missing there is computed"
    if known.exact:
        yield "dvc repro"
    else:
        there = params.value((origin.git("show", f"{known.commit}:{paths.PARAMS}") or b"{}").decode())
        yield shlex.join(["dvc", "exp", "run", *overrides(there, settings)])
    if md5:
        yield f"echo '{md5}  {paths.TEACHER}' | md5sum -c  # the same checkpoint, byte for byte"
    else:
        yield f"# UNKNOWN: the md5 of {paths.TEACHER}; the row says none, so it can't be compared"
    yield "python -m pipelines.sync  # and its row, in the clone's MLflow unless params.yaml names a server"


NAMED = {"dvc.exp_name": "experiment", "dino.sweep": "sweep"}


def overrides(current: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """-S for each setting of the row that differs."""
    changed = differences(dict(current), dict(settings))
    return [part for one in changed if not one.startswith("+") for part in ("-S", one)]


def links(settings: Mapping[str, Any]) -> Iterator[str]:
    """Links to files outside git that settings name by a path below the repository."""
    for dotted in origin.OUTSIDE:
        section, _, name = dotted.partition(".")
        path = Path(str(settings.get(section, {}).get(name, "")))
        if path.is_absolute():
            yield f"# Needs {path}, as it was."
        elif path.exists() and paths.RAW not in path.parents and not origin.words("ls-files", "--", str(path)):
            yield f"mkdir -p {shlex.quote(str(path.parent))}"
            yield shlex.join(["ln", "-s", str(path.resolve()), str(path)])


def variables(tags: Mapping[str, str]) -> Iterator[str]:
    """What of the environment changes bits, as it was."""
    recorded = any(name.startswith("environment.") for name in tags)
    for name in origin.REPEATING if recorded else ():
        value = tags.get(f"environment.{name}")
        if value:
            yield f"export {name}={shlex.quote(value)}"
        elif name in os.environ:
            yield f"unset {name}"


def other_environment(tags: Mapping[str, str]) -> Iterator[str]:
    """How this machine differs from the one that made the row, where that can change bits."""
    now = {"environment.cpus": str(os.cpu_count())}
    for package in ("torch", "torchvision", "numpy"):
        now[f"versions.{package}"] = metadata.version(package)
    found = [f"{k.partition('.')[2]} {tags[k]} then, {v} here" for k, v in now.items() if tags.get(k, v) != v]
    if found:
        yield f"OTHER here: {', '.join(found)}; the result will be as good, but perhaps not the same bytes."
    if tags.get("pretrain.bit_exact") == "False":
        yield "NOT EXACT then: it was resumed in another environment, so these bytes need not come again."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.trace", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", metavar="RUN", help="id, its beginning, name, or experiment")
    parser.add_argument("--anew", action="store_true", help="compute everything: no cache, no remote")
    parser.add_argument("--into", metavar="FOLDER", help="of the clone; default: beside this repository")
    options = parser.parse_args(arguments)

    def work() -> None:
        store = open_store(params.load())
        rows = store.rows()
        one = find(rows, options.run)
        root = paths.real_root()
        folder = options.into or str(root.parent / f"{root.name}-{one.run_id[:8]}")
        for line in script(one, teacher_md5(one, rows), anew=options.anew, folder=folder):
            print(line)

    run_command("trace", work)


if __name__ == "__main__":
    main()
    sys.exit()
