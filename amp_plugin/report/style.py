"""How every picture looks: on solid white, which reads on light and dark pages alike, whatever the user's own style."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color), which the colour-blind tell apart.
BLUE, SKY, VERMILION, GREEN, PINK, AMBER = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00"

_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.alpha": 0.3,
    "savefig.facecolor": "white",
}


@contextmanager
def picture(path: Path, title: str, size: tuple[float, float], figures: str = "") -> Iterator[Figure]:
    """A figure to draw on, saved as a PNG at the end.

    Args:
        path: the PNG to write.
        title: above the picture.
        size: width and height in inches, of 120 pixels each.
        figures: the text with the figures that are drawn, for `shows`.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
    """
    from matplotlib import style
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=size, layout="compressed")
        figure.suptitle(title)
        yield figure
        figure.savefig(path, dpi=120, metadata=stamp(figures) if figures else None)


def stamp(figures: str) -> dict[str, str]:
    """Metadata for a picture's file that says which figures it was drawn from; `shows` reads it."""
    return {"Description": hashlib.sha256(figures.encode()).hexdigest()}


def shows(path: Path, figures: str) -> bool:
    """Whether a picture, PNG or SVG, was drawn from these figures."""
    return stamp(figures)["Description"].encode() in path.read_bytes()
