"""How figures look and leave: colours, matplotlib's settings, PNG files, SVG in the colours and font of its page.

Equal inputs give equal bytes: no dates, no versions, no random ids.
"""

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Told apart with any colour vision. Drawn in the light ones; in an SVG each becomes var(--name): the page chooses.
LIGHT = {
    "ink": "#1a2130", "muted": "#5c6677", "line": "#d9dee7", "paper": "#ffffff",
    "trained": "#0b66c3", "untrained": "#c8560a", "pixels": "#727d8f",
}  # fmt: skip
DARK = {
    "ink": "#e7ebf3", "muted": "#9ba6b8", "line": "#323b4a", "paper": "#12161e",
    "trained": "#62b0ff", "untrained": "#ff9d57", "pixels": "#98a3b5",
}  # fmt: skip
STYLE: Any = {
    "font.family": "DejaVu Sans",  # matplotlib's own: the same letters everywhere
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a class may be named `$x$`
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "dino",
    "savefig.facecolor": LIGHT["paper"],
    "figure.dpi": 100,
}


@contextmanager
def style() -> Iterator[None]:
    """Our style; a letter that the font lacks (a class name in another script) becomes a box without a warning."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def png(figure: Figure, *, dpi: int = 160) -> bytes:
    """A figure as a PNG file."""
    with style(), io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
        return file.getvalue()


def picture_png(picture: np.ndarray) -> bytes:
    """A picture, uint8 [H, W, 3], as a PNG file."""
    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, format="PNG", optimize=True)
        return file.getvalue()


def data_uri(data: bytes) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: in the page's colours and font, transparent, with no address in it.

    Args:
        figure: The figure.
        name: Prefix of its ids, so that several figures fit on one page.
    """
    with style(), io.StringIO() as file:
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
    for colour, value in LIGHT.items():
        text = text.replace(value, f"var(--{colour})")
    return text.strip()
