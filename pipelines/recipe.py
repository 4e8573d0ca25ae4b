"""`python -m pipelines.recipe`: the recipes and what each claims; with a NAME, that training.

It runs as a DVC experiment of that name in a clone that DVC makes and removes (`dvc exp run --temp`), so that the
params.yaml, models and results that lie here stay as they are. `dvc exp apply NAME` brings the experiment's here,
`dvc exp show` compares. A training that was interrupted goes on when the same command runs again.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines import params, paths
from pipelines.processes.runner import child_environment
from pipelines.processes.stage import run_command

FOLDER = Path("recipes")
DEFAULT = "fashion-mnist-cpu"  # names every setting; the others name what they change
PLAIN = re.compile(r"[A-Za-z/][\w./-]*", re.ASCII)  # words that need no quotes
NARROW = 100  # columns; below, each claim takes a line of its own

Settings = dict[str, Any]  # section -> name -> value, as in params.yaml


@dataclass(frozen=True)
class Claims:
    """What a recipe says of itself; `folder` says what --data must name, where the images can't be fetched."""

    title: str
    source: str
    data: str
    expected: str
    hardware: str
    time: str
    run: str
    folder: str = ""


@dataclass(frozen=True)
class Recipe:
    """A file of recipes/: claims, and the settings in which it differs from the default recipe."""

    name: str
    claims: Claims
    settings: Settings

    @staticmethod
    def read(path: Path) -> "Recipe":
        """From its file.

        Raises:
            ValueError: No such file, or not what a recipe holds.
        """
        content = params.read(path)
        known = {field.name for field in fields(Claims)}
        claims = content.get("claims")
        if set(content) != {"claims", "settings"} or not isinstance(claims, dict) or not set(claims) <= known:
            raise ValueError(f"{path} is no recipe: it holds `claims` ({', '.join(sorted(known))}) and `settings`")
        if missing := known - set(claims) - {"folder"}:
            raise ValueError(f"{path}: claims lack {', '.join(sorted(missing))}")
        return Recipe(path.stem, Claims(**claims), content["settings"] or {})


def recipes() -> dict[str, Recipe]:
    """All of recipes/ by name, the default first."""
    names = sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (name != DEFAULT, name))
    if DEFAULT not in names:
        raise ValueError(f"no {FOLDER / DEFAULT}.yaml in {Path.cwd()}; run from the repository's root")
    return {name: Recipe.read(FOLDER / f"{name}.yaml") for name in names}


def find(name: str, known: Mapping[str, Recipe]) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: There is none; with the one that may be meant.
    """
    if name in known:
        return known[name]
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"no recipe {name!r}; {hint}choose one of {', '.join(known)}")


def whole_settings(recipe: Recipe, known: Mapping[str, Recipe], data: Path | None, options: Sequence[str]) -> Settings:
    """Every setting but those of `runtime`: the default recipe's, this one's, --data and -S, each over those before.

    Raises:
        ValueError: An option that is none, or a recipe that needs --data and got none.
    """
    if recipe.claims.folder and not data:
        raise ValueError(f"{recipe.name} needs --data FOLDER: {recipe.claims.folder}")
    settings: Settings = {section: dict(values) for section, values in known[DEFAULT].settings.items()}
    for section, values in recipe.settings.items():
        settings[section] = settings.get(section, {}) | values
    if data:
        if not data.is_dir():
            raise ValueError(f"--data {data}: no such folder (looked for {data.absolute()})")
        settings["data"]["folder"] = str(data.absolute())  # the clone lies elsewhere
    for option in options:
        name, equals, text = option.partition("=")
        *sections, last = name.split(".")
        if not equals or not sections:
            raise ValueError(f"-S {option!r}: write SECTION.NAME=VALUE, such as pretrain.epochs=10")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = params.value(text)
    return settings


def over(current: Settings, settings: Settings) -> Settings:
    """`settings` over the current ones, which keep what they alone have (`runtime`)."""
    merged = dict(current)
    for name, value in settings.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = over(merged[name], value) if both else value
    return merged


def differences(current: Settings, settings: Settings, *place: str) -> Iterator[str]:
    """`section.name=value` of each setting that differs from the current one, as `dvc exp run -S` reads it."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from differences(current.get(name) or {}, value, *place, name)
        elif name not in current or current[name] != value or type(current[name]) is not type(value):
            yield f"{'' if name in current else '+'}{'.'.join((*place, name))}={written(value)}"


def written(value: Any) -> str:
    """A value in the grammar of DVC's overrides (Hydra's)."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            text = format(Decimal(repr(value)), "f")  # 1e-06 would come back as a word
            return text if "." in text else f"{text}.0"
        case list():
            return f"[{','.join(map(written, value))}]"
        case str() if not PLAIN.fullmatch(value) or value.lower() in ("null", "true", "false", "nan", "inf"):
            before_quotes = re.sub(r'(\\*)"', r'\1\1\\"', value)  # a backslash is one unless a quote follows
            return '"' + re.sub(r"(\\+)\Z", r"\1\1", before_quotes) + '"'
    return str(value)


def command(name: str, changed: Sequence[str]) -> list[str]:
    """What DVC is called with."""
    options = [part for one in changed for part in ("-S", one)]
    return ["exp", "run", "--temp", "--name", name, *options]


def experiments() -> list[str]:
    """Names of the experiments that stand on the current commit.

    Raises:
        ValueError: No git or DVC repository here.
    """
    dvc = [sys.executable, "-m", "dvc", "exp", "list", "--name-only"]
    done = subprocess.run(dvc, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word"]
        raise ValueError(f"DVC can't list experiments here ({said[-1]}); a recipe needs a git clone of the repository")
    return done.stdout.split()


def print_table(console: Console, known: Mapping[str, Recipe]) -> None:
    """Each recipe with its claims."""
    shown = {"title": "trains", "hardware": "hardware", "time": "time", "expected": "expected", "run": "run"}
    if console.width >= NARROW:
        table = Table(box=None, padding=(0, 2, 1, 0), header_style="dim")
        table.add_column("recipe", no_wrap=True)
        for title in shown.values():
            table.add_column(title)
        for name, recipe in known.items():
            table.add_row(Text(name, style="bold"), *(Text(getattr(recipe.claims, claim)) for claim in shown))
        console.print(table)
    else:
        for name, recipe in known.items():
            console.print(Text(f"\n{name}", style="bold"))
            for claim, title in shown.items():
                console.print(Text(f"  {title}: {getattr(recipe.claims, claim)}"))
    start = (
        f"python -m pipelines.recipe NAME [--data FOLDER] [-S key=value ...]; settings and sources: {FOLDER}/NAME.yaml"
    )
    console.print(Text(f"\nStart one: {start}"))


def print_claims(console: Console, recipe: Recipe) -> None:
    """What is about to be run."""
    for field in fields(Claims):
        if text := getattr(recipe.claims, field.name):
            console.print(Text(f"{field.name:>9}  {text}"), soft_wrap=True)


def start(recipe: Recipe, known: Mapping[str, Recipe], options: argparse.Namespace) -> None:
    """Check the settings, then become DVC, which runs them.

    Raises:
        ValueError: Settings that don't fit, or an experiment of this name that exists.
    """
    console = Console(highlight=False)
    settings = whole_settings(recipe, known, options.data, options.set)
    current = params.read(paths.PARAMS)
    params.check(over(current, settings), f"the recipe {recipe.name} with these options")
    name = options.experiment or recipe.name
    arguments = command(name, [*differences(current, settings)])
    print_claims(console, recipe)
    console.print(Text(f"\ndvc {shlex.join(arguments)}\n", style="dim"), soft_wrap=True)
    if options.dry:
        return
    if name in experiments():
        raise ValueError(
            f"an experiment {name} stands on this commit already: `dvc exp apply {name}` brings its results here; "
            "--name OTHER runs one beside it"
        )
    console.print(
        f"In a clone: params.yaml and results here stay as they are. When it is done, `dvc exp apply {name}` brings "
        "its own here. Interrupted, it goes on with the same command.\n",
        soft_wrap=True,
    )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "dvc", *arguments], child_environment())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.recipe", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("name", nargs="?", help="recipe to start; left out: a table of all")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="your images, in place of the recipe's data set")
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--name", dest="experiment", metavar="NAME", help="of the experiment; default: the recipe's")
    parser.add_argument("--dry", action="store_true", help="check the settings and show the command only")
    options = parser.parse_args(arguments)

    def work() -> None:
        known = recipes()
        if options.name is None:
            print_table(Console(highlight=False), known)
        else:
            start(find(options.name, known), known, options)

    run_command("recipe", work)


if __name__ == "__main__":
    main()
