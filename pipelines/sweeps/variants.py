"""What a sweep tries: every combination of the values given, with every seed, each checked before anything starts."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pipelines import params, paths
from pipelines.recipe import over, written
from pipelines.rows import row

SEED = "pretrain.seed"
LONGEST_NAME = 150  # characters; a file system takes 255

Settings = dict[str, Any]  # dotted name -> value: {"pretrain.local_crops": 4}


@dataclass(frozen=True)
class Variant:
    """One experiment of a sweep: its name, and the settings that tell it from the others."""

    name: str
    settings: Settings

    def overrides(self) -> list[str]:
        """As `dvc exp run` takes them."""
        return [part for name, value in self.settings.items() for part in ("-S", f"{name}={written(value)}")]


def parse(arguments: Sequence[str], seeds: Sequence[int] = ()) -> dict[str, list[Any]]:
    """`pretrain.epochs=5,10` as {"pretrain.epochs": [5, 10]}; a list is one value in brackets.

    Raises:
        ValueError: An argument that is none, a setting named twice, or one that changes no result.
    """
    found: dict[str, list[Any]] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not text.strip() or "." not in name:
            raise ValueError(f"{argument!r}: write SECTION.NAME=VALUE,VALUE such as pretrain.local_crops=4,8")
        if name in found:
            raise ValueError(f"{name} stands there twice; write all its values in one: {name}=VALUE,VALUE")
        if name.startswith("runtime."):
            raise ValueError(f"{name} changes no result, so there is nothing to compare; set it in {paths.PARAMS}")
        found[name] = params.value(f"[{text}]")
    if seeds and SEED in found:
        raise ValueError(f"{SEED} and --seeds are the same; use one of them")
    return found | ({SEED: list(seeds)} if seeds else {})


def grid(values: Mapping[str, Sequence[Any]], current: Mapping[str, Any], sweep: str) -> list[Variant]:
    """Every combination, checked as a whole params.yaml; the last setting varies fastest.

    Args:
        values: {dotted name: values}.
        current: params.yaml as it is.
        sweep: Its name, which the variants' begin with.

    Raises:
        ValueError: Every wrong value or combination, once.
    """
    problems: dict[str, list[str]] = {}
    chosen: list[Settings] = []
    for combination in product(*values.values()):
        raw = dict(zip(values, combination, strict=True))
        try:
            checked = row.plain(params.check(over(dict(current), nested(raw)), paths.PARAMS))
        except ValueError as error:
            for line in str(error).splitlines()[1:]:  # the first one counts them
                problems.setdefault(line.strip(), []).append(label(raw))
            continue
        settings = {name: look_up(checked, name) for name in raw}
        if settings in chosen:
            raise ValueError(f"{label(settings)} stands there twice; name each value once")
        chosen.append(settings)
    if problems:
        raise ValueError("nothing was started:\n" + "\n".join(_told(*one, of=len(chosen)) for one in problems.items()))
    return [Variant(name, settings) for name, settings in zip(_names(sweep, chosen), chosen, strict=True)]


def _told(problem: str, labels: Sequence[str], *, of: int) -> str:
    """A problem, and in which variants unless it is in all."""
    if not of:
        return f"  {problem}"
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"  {problem} (in {labels[0]}{more})"


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"pretrain.seed": 1} as {"pretrain": {"seed": 1}}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def look_up(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name; a section's whole for its own name."""
    found: Any = settings
    for part in name.split("."):
        found = found[part]
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """`pretrain.seed` is called `seed` where no other setting here ends so."""
    lasts = [name.rpartition(".")[2] for name in names]
    return {name: last if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)}


def label(settings: Mapping[str, Any]) -> str:
    """Like `lr_at_256=0.00025 local_crops=4`."""
    called = short_names([*settings])
    return " ".join(f"{called[name]}={shown(value)}" for name, value in settings.items())


def shown(value: Any) -> str:
    """A value in few letters."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _names(sweep: str, chosen: Sequence[Settings]) -> list[str]:
    """Names that git and DVC take, telling the settings where that is short enough; no two are the same."""
    names = []
    for settings in chosen:
        texts = {k: Path(v).name if isinstance(v, str) else shown(v).strip("[]") for k, v in settings.items()}
        plain = re.sub(r"[^\w.+=-]+", "-", f"{sweep}-{label(texts)}", flags=re.ASCII)
        names.append(re.sub(r"\.{2,}", ".", plain).strip("-."))
    return [
        name
        if names.count(name) == 1 and len(name) <= LONGEST_NAME and not name.endswith(".lock")
        else f"{name[: LONGEST_NAME - 9].strip('-.')}-{digest(settings)}"
        for name, settings in zip(names, chosen, strict=True)
    ]


def digest(content: Any) -> str:
    """Eight hex digits that tell settings apart."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:8]
