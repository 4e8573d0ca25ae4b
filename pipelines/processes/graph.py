"""DVC's own graph as {stage: what it needs}. DVC alone decides what is stale; nobody else copies its graph."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configobj import ConfigObj
from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo

Graph = dict[str, tuple[str, ...]]


def stage_graph() -> Graph:
    """Stages of the current directory's repository, each with the stages it needs; in an order that can run.

    Raises:
        ValueError: this is not a DVC repository's root, or DVC cannot read its graph.
    """
    if not (Path(".dvc").is_dir() and Path("dvc.yaml").is_file()):
        raise ValueError(f"{Path.cwd()} has no dvc.yaml beside a .dvc folder: go to the repository's root and repeat")
    try:
        with Repo() as repo:
            graph = repo.index.graph
            place = {stage.addressing: number for number, stage in enumerate(repo.index.stages)}
            needs = {stage.addressing: [n.addressing for n in graph.successors(stage)] for stage in graph}
    except DvcException as error:
        raise ValueError(f"dvc.yaml: {_in_full(error)}") from error
    ordered: Graph = {}
    while len(ordered) < len(needs):  # DVC has refused cycles
        ready = [s for s in needs if s not in ordered and all(n in ordered for n in needs[s])]
        first = min(ready, key=place.__getitem__)
        ordered[first] = tuple(sorted(needs[first], key=place.__getitem__))
    return ordered


def _in_full(error: BaseException | None) -> str:
    """DVC's error with its causes: the place of the mistake is often in the cause."""
    texts: list[str] = []
    while error is not None:
        text = str(error).strip()
        texts += [text] if text and text not in texts else []
        error = error.__cause__
    return ": ".join(texts)


def stages_for(graph: Graph, targets: Iterable[str]) -> Graph:
    """The part of `graph` that `targets` need, themselves included; all of it without targets.

    Raises:
        ValueError: a target that is no stage.
    """
    todo = list(targets) or list(graph)
    for unknown in (name for name in todo if name not in graph):
        near = difflib.get_close_matches(unknown, graph, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"dvc.yaml has no stage {unknown!r}{hint} Its stages: {', '.join(graph)}")
    chosen: set[str] = set()
    while todo:
        if (name := todo.pop()) not in chosen:
            chosen.add(name)
            todo += graph[name]
    return {name: needs for name, needs in graph.items() if name in chosen}


@dataclass(frozen=True)
class Outside:
    """Where data comes from: the default remote's name; .dvc files of imports, and of data that is missing here."""

    remote: str | None
    imports: tuple[str, ...]
    missing: tuple[str, ...]


def outside() -> Outside:
    """Sources of data of the current directory's repository."""
    with Repo() as repo:
        sources = [stage for stage in repo.index.stages if stage.is_data_source]
        return Outside(
            remote=repo.config["core"].get("remote"),
            imports=tuple(stage.relpath for stage in sources if stage.is_import),
            missing=tuple(s.relpath for s in sources if not all(out.exists for out in s.outs)),
        )


def stage_params() -> dict[str, tuple[str, ...]]:
    """Settings that each stage reads: {"knn": ("knn",), "fetch": ("data.folder",)}."""
    with Repo() as repo:
        return {
            stage.addressing: tuple(
                name for dep in stage.deps if isinstance(dep, ParamsDependency) for name in dep.params
            )
            for stage in repo.index.stages
        }


def cache_and_remote() -> tuple[str, str | None]:
    """The folder of this repository's cache, and the name of its default remote."""
    with Repo() as repo:
        return repo.cache.local_cache_dir, repo.config["core"].get("remote")


def settings_of_a_clone() -> str:
    """The .dvc/config.local of a clone that shares this repository's cache, run-cache and local settings.

    Files are linked to the cache where the file system can: a clone costs no second copy of the data.
    """
    with Repo() as repo:
        text = ConfigObj()
        for section, values in repo.config.read("local").items():
            named = section in ("remote", "machine", "db")
            for name, inner in values.items() if named else [(section, values)]:
                if inner:
                    text[f'{section} "{name}"' if named else section] = dict(inner)
        cache = text.setdefault("cache", {})
        cache["dir"] = repo.cache.local_cache_dir
        if "type" not in repo.config["cache"]:
            cache["type"] = "reflink,hardlink,copy"
    return "\n".join(text.write()) + "\n"
