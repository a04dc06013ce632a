"""The measured ratios as a picture: a point for each median, a line for its quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes  # imported first: without matplotlib the benchmark shall not even start

from amp_plugin.report.style import AMBER, BLUE, GREEN, PINK, SKY, VERMILION, picture
from benchmarks.rows import Row

_STYLES: list[dict[str, Any]] = [
    {"color": c, "fmt": m} for c, m in zip((BLUE, VERMILION, GREEN, PINK, AMBER, SKY), "osD^vP", strict=True)
]


def draw(rows: Sequence[Row], path: Path, caption: str) -> None:
    """Draw one panel for each section: the ratios by case. Without a row that has a ratio nothing is drawn."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        if row.baseline_value:
            sections.setdefault(row.section, []).append(row)
    if not sections:
        return
    heights = [1.6 + 0.16 * len(some) + 0.12 * len({row.case for row in some}) for some in sections.values()]
    with picture(path, "", (9.0, sum(heights))) as figure:
        panels = figure.subplots(len(sections), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (section, some) in zip(panels, sections.items(), strict=True):
            _panel(axes, section, some)
        figure.supxlabel(caption, fontsize=7)


def _panel(axes: Axes, section: str, rows: Sequence[Row]) -> None:
    cases, names = (list(dict.fromkeys(getattr(row, what) for row in rows)) for what in ("case", "name"))
    for k, name in enumerate(names):
        chosen = [row for row in rows if row.name == name]
        offset = (k - (len(names) - 1) / 2) * 0.7 / len(names)
        axes.errorbar(
            [r.ratio for r in chosen],
            [cases.index(r.case) + offset for r in chosen],
            xerr=[[r.ratio - r.low for r in chosen], [r.high - r.ratio for r in chosen]],
            label=f"{name} / {chosen[0].baseline}",
            markersize=5,
            elinewidth=2,
            **_STYLES[k % len(_STYLES)],
        )
    axes.set(yticks=range(len(cases)), yticklabels=cases, ylim=(len(cases) - 0.4, -0.6))
    axes.set_xlabel("ratio to the baseline (median and quartiles)")
    columns = 1 if any(len(name) > 45 for name in names) else 2
    axes.set_title(section, loc="left", pad=8 + 14 * -(-len(names) // columns), fontweight="bold")
    axes.axvline(1.0, color="0.4", linewidth=1.0)
    if section == "Step":
        axes.axvline(2.0, color="0.4", linewidth=1.0, linestyle="--")  # two passes
    axes.grid(False, axis="y")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False, fontsize=8)
