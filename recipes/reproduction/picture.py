"""The tables as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from amp_plugin.report.style import AMBER, BLUE, VERMILION, legend_below, picture
from reproduction.comparison import REFERENCE, Row, interval, reference_of
from reproduction.published import Setting, published
from reproduction.table import markdown

_SEED: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0.8, "zorder": 3}
_PANELS = {"eval_error": "test error %, last epoch", "eval_nll": "test NLL"}


def draw(tables: Mapping[Setting, Sequence[Row]], title: str, with_paper: bool, path: Path) -> None:
    """Draw error and NLL of every method, a pair of panels for each setting.

    Args:
        tables: rows by setting, as `reproduction.comparison.rows_of` returns them; not empty.
        title: text above the picture.
        with_paper: whether the published figures are drawn too.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
    """
    heights = [0.9 + 0.3 * len(rows) for rows in tables.values()]
    with picture(path, title, (10.5, 0.8 + sum(heights)), markdown(tables, with_paper)) as figure:
        grid: Any = figure.subplots(len(tables), 2, squeeze=False, height_ratios=heights)
        for axes, (setting, rows) in zip(grid, tables.items(), strict=True):
            paper = published().results.get(setting, {}) if with_paper else {}
            for panel, (name, head) in zip(axes, _PANELS.items(), strict=True):
                _panel(panel, rows, name)
                panel.set_xlabel(head)
                for place, row in enumerate(rows):
                    if figures := paper.get(row.method):
                        published_value = figures.mean if name == "eval_error" else figures.nll
                        panel.plot([published_value], [place], "D", color=AMBER, markersize=5, label="the paper's")
            axes[0].set_yticks(range(len(rows)), [row.label() for row in rows])
            axes[1].set_yticks(range(len(rows)), [""] * len(rows))
            axes[0].set_title(f"{setting.dataset}, {setting.model}, augmentation {setting.augment}", loc="left")
        legend_below(figure)


def _panel(axes: Any, rows: Sequence[Row], name: str) -> None:
    if reference := reference_of(rows):
        axes.axvline(mean(reference.numbers(name)), color="0.4", linestyle="--", linewidth=1, label="ERM's mean")
    for place, row in enumerate(rows):
        numbers = row.numbers(name)
        colour, bar = (VERMILION, " (ERM)") if row.method == REFERENCE else (BLUE, "")
        axes.plot(numbers, [place] * len(numbers), "o", color="0.3", markerfacecolor="white", label="a seed", **_SEED)
        if found := interval(numbers):
            label = f"mean, 95 % interval{bar}"
            axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2, label=label)
        axes.plot([mean(numbers)], [place], "s", color=colour, markersize=5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
