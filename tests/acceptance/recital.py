"""The commands of a page of docs/, run as they stand there."""

import re
from pathlib import Path


def commands(page: Path) -> dict[str, list[str]]:
    """{heading: its ```sh blocks, in order}."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[heading.strip()] = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return found


def with_values(block: str, values: dict[str, str]) -> str:
    """A block of `export NAME=value`, other values for some of its names.

    Raises:
        KeyError: a name that the block does not set.
    """
    for name, value in values.items():
        block, changed = re.subn(rf"(?<=\s){name}=\S+", lambda _, to=f"{name}={value}": to, block)
        if not changed:
            raise KeyError(name)
    return block
