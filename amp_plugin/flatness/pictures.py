"""Pictures of loss landscapes, with several models on one scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amp_plugin.flatness.landscape import Array, Landscape
from amp_plugin.report.style import AMBER, BLUE, GREEN, PINK, SKY, VERMILION, legend_below, picture
from amp_plugin.text import for_matplotlib

_LINES = tuple(
    zip((BLUE, VERMILION, GREEN, PINK, SKY, AMBER), ("-", "--", "-.", ":", "-", "--"), "os^vDX", strict=True)
)
_LONGEST = 40  # characters of a model's name
_RATIO = 20  # the scale is logarithmic from this ratio of the largest to the smallest loss
_LEVELS = 12  # approximate number of contours
_ERROR = "error (%)"  # this scale is never logarithmic, because a classifier may make no error
_Panels = dict[str, dict[str, Array]]  # losses (and errors, if all models have them) by axis label and model
_STEP = "step along {} random direction\n(1: as long as the weights, filter by filter)"


def plot_landscapes(landscapes: Mapping[str, Landscape], path: Path, title: str, *, unit: str = "nats") -> None:
    """Draw loss and error to a PNG, for several models on one scale.

    Landscapes of one direction become a line for each model, and landscapes of two directions become contours in a
    column for each model. An area is grey where the loss is not finite. The scale of the loss is logarithmic where the
    losses differ much.

    Args:
        landscapes: landscapes by the name of the model, all of as many directions.
        path: PNG file to write.
        title: text above the picture.
        unit: unit of the loss, by default nats.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[flatness]"``).
        ValueError: there are no landscapes, their numbers of directions differ, or no loss is finite.
    """
    dimensions = {scape.loss.ndim for scape in landscapes.values()}
    if len(dimensions) != 1:
        raise ValueError("give landscapes that all have as many directions, one at least")
    if not any(np.isfinite(scape.loss).any() for scape in landscapes.values()):
        raise ValueError("no loss in the landscapes is finite")
    (_draw_lines if dimensions == {1} else _draw_planes)(landscapes, path, title, _panels(landscapes, unit))


def _draw_lines(landscapes: Mapping[str, Landscape], path: Path, title: str, panels: _Panels) -> None:
    with picture(path, title, (0.4 + 4.6 * len(panels), 4.6)) as figure:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, values) in zip(row, panels.items(), strict=True):
            for (name, heights), (colour, style, marker) in zip(values.items(), itertools.cycle(_LINES), strict=False):
                steps = landscapes[name].steps
                axes.plot(
                    steps,
                    np.where(np.isfinite(heights), heights, np.nan),
                    linestyle=style,
                    color=colour,
                    label=for_matplotlib(name, _LONGEST),
                    marker=marker,
                    markersize=4,
                    markevery=[len(steps) // 2],  # only the weights themselves have a marker
                    linewidth=1.6,
                )
            axes.set(xlabel=_STEP.format("a"), ylabel=label)
            if _logarithmic(label, values):
                axes.set_yscale("log")
            elif _finite(values).min() >= 0:
                axes.set_ylim(bottom=0)
        legend_below(figure, 3)


def _draw_planes(landscapes: Mapping[str, Landscape], path: Path, title: str, panels: _Panels) -> None:
    with picture(path, title, (1.6 + 3.6 * len(landscapes), 0.9 + 3.7 * len(panels))) as figure:
        rows = figure.subplots(len(panels), len(landscapes), squeeze=False, sharex=True, sharey=True)
        for row, (label, values) in zip(rows, panels.items(), strict=True):
            scale = _scale(values, logarithmic=_logarithmic(label, values))
            for axes, (name, heights) in zip(row, values.items(), strict=True):
                filled = _draw_plane(axes, landscapes[name].steps, heights, scale)
                middle = len(heights) // 2
                axes.set_title(
                    f"{for_matplotlib(name, _LONGEST)}\n{label}, at the weights: {heights[middle, middle]:.3g}",
                    fontsize=9,
                )
            figure.colorbar(filled, ax=list(row), label=label, ticks=scale["levels"], format="%.3g", shrink=0.9)
            row[0].set(ylabel=_STEP.format("another"))
        for axes in rows[-1]:
            axes.set(xlabel=_STEP.format("a"))


def _panels(landscapes: Mapping[str, Landscape], unit: str) -> _Panels:
    panels = {f"loss ({for_matplotlib(unit, _LONGEST)})": {name: scape.loss for name, scape in landscapes.items()}}
    errors = {name: scape.error for name, scape in landscapes.items() if scape.error is not None}
    return {**panels, _ERROR: errors} if len(errors) == len(landscapes) else panels


def _finite(values: Mapping[str, Array]) -> Array:
    together = np.concatenate([heights.ravel() for heights in values.values()])
    finite: Array = together[np.isfinite(together)]
    return finite


def _logarithmic(label: str, values: Mapping[str, Array]) -> bool:
    low, high = _finite(values).min(), _finite(values).max()
    return label != _ERROR and bool(0 < low * _RATIO <= high)


def _scale(values: Mapping[str, Array], *, logarithmic: bool) -> dict[str, Any]:
    """Choose contour levels at round numbers, and the colours between them, for all models alike."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import LogLocator, MaxNLocator

    finite = _finite(values)
    low, high = float(finite.min()), float(finite.max())
    levels: Array
    if logarithmic:
        per_decade = _LEVELS / math.log10(high / low)
        steps = (1.0, 2.0, 5.0) if per_decade >= 3 else (1.0, 3.0) if per_decade >= 2 else (1.0,)
        levels = np.asarray(LogLocator(subs=steps, numticks=99).tick_values(low, high))
    else:
        levels = np.asarray(MaxNLocator(_LEVELS).tick_values(low, high if high > low else low + 1))
    # The levels end at the nearest round numbers around all values.
    first, last = np.searchsorted(levels, low, "right") - 1, np.searchsorted(levels, high)
    levels = levels[max(first, 0) : last + 1]
    return {"levels": levels, "norm": BoundaryNorm(levels, 256), "cmap": "viridis"}


def _draw_plane(axes: Any, steps: Array, heights: Array, scale: Mapping[str, Any]) -> Any:
    axes.grid(False)
    axes.set_aspect("equal")
    axes.set_facecolor("lightgrey")  # this shows where the network overflows
    shown = np.ma.masked_invalid(heights.T)  # the first direction goes to the right
    filled = axes.contourf(steps, steps, shown, **scale)
    axes.contour(steps, steps, shown, levels=scale["levels"], colors="black", linewidths=0.6, alpha=0.5)
    axes.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=1.6)
    return filled
