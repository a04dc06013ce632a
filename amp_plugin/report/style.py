"""How every picture looks: on solid white, which reads on light and dark pages alike, whatever the user's own style."""

from __future__ import annotations

import hashlib
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from amp_plugin.text import for_matplotlib
from amp_plugin.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color), which the colour-blind tell apart.
BLUE, SKY, VERMILION, GREEN, PINK, AMBER = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00"

_PER_INCH = 8  # characters of a title
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
    """Yield a figure to draw on, whose width and height are in inches of 120 pixels, and save it as a PNG at the end.

    The text ``figures`` lists the numbers that are drawn, by which `shows` knows the picture. The title's own lines
    stay; other texts that are not the program's go through `amp_plugin.text.for_matplotlib`.
    """
    from matplotlib import style
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box, and would be told often
        figure = Figure(figsize=size, layout="compressed")
        columns = int(size[0] * _PER_INCH)
        lines = (for_matplotlib(part) for line in title.split("\n") for part in textwrap.wrap(line, columns) or [""])
        figure.suptitle("\n".join(lines))
        yield figure
        with whole_file(path) as new:
            figure.savefig(new, dpi=120, metadata=stamp(figures) if figures else None)


def legend_below(figure: Figure, columns: int = 0) -> None:
    """Put one legend below all panels, which are drawn already; a label that several panels have stands there once."""
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = columns or len(handles)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def stamp(figures: str) -> dict[str, str]:
    """Return metadata for a picture's file that say which figures it was drawn from; `shows` reads them."""
    return {"Description": hashlib.sha256(figures.encode()).hexdigest()}


def shows(path: Path, figures: str) -> bool:
    """Return whether a picture, PNG or SVG, was drawn from these figures."""
    return stamp(figures)["Description"].encode() in path.read_bytes()
