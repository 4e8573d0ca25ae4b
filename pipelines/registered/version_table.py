"""The list of registered checkpoints, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pipelines.registered.version import HEALTH_TAG, ROLLED_BACK_TAG, SINCE_TAG, TITLES, UNTIL_TAG, Version
from pipelines.rows.row import TEACHER_TAG

WIDE = 250  # columns


def show(versions: Sequence[Version], champion: Version | None, score: str) -> None:
    """Print them; to a file or a pipe in lines as long as they are."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table(versions, champion, score))
    console.print("percent (95 % interval); times UTC", style="dim")


def table(versions: Sequence[Version], champion: Version | None, score: str) -> Table:
    """A row a version, the newest first."""
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("version", "", "training", f"{TITLES[score]} on val", "on test", "health", "registered", "md5"):
        found.add_column(title, no_wrap=True)
    for one in versions:
        is_champion = champion is not None and one.number == champion.number
        shown = [str(one.top1(score, split) or "-") for split in ("val", "test")]
        md5 = one.tags[TEACHER_TAG][:8]
        when = f"{one.registered:%Y-%m-%d %H:%M}"
        cells = (one.number, reign(one, is_champion), one.name, *shown, one.tags.get(HEALTH_TAG, "-"), when, md5)
        found.add_row(*cells, style="bold" if is_champion else "")
    return found


def reign(version: Version, is_champion: bool) -> str:
    """Whether and when a version was champion."""
    tags = version.tags
    if is_champion:
        return f"champion since {tags.get(SINCE_TAG, '?')[:16]}"
    if ROLLED_BACK_TAG in tags:
        return f"rolled back {tags[ROLLED_BACK_TAG][:16]}"
    return f"champion until {tags[UNTIL_TAG][:16]}" if UNTIL_TAG in tags else ""
