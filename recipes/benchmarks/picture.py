"""The measured ratios as a picture: a point for each median, a line for its quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from amp_plugin.report.style import AMBER, BLUE, GREEN, PINK, SKY, VERMILION
from benchmarks.rows import Row

_COLOURS = (BLUE, VERMILION, GREEN, PINK, AMBER, SKY)
_MARKS = "osD^vP"


def draw(rows: Sequence[Row], path: Path, caption: str) -> None:
    """One panel a section: the ratio of each row, by case; nothing if no row has a ratio."""
    sections = list(dict.fromkeys(row.section for row in rows if row.baseline_value))
    if not sections:
        return
    cases = {s: list(dict.fromkeys(r.case for r in rows if r.section == s)) for s in sections}
    names = {s: list(dict.fromkeys(r.name for r in rows if r.section == s)) for s in sections}
    heights = [1.6 + 0.16 * sum(r.section == s for r in rows) + 0.12 * len(cases[s]) for s in sections]
    figure = Figure(figsize=(9.0, sum(heights)), layout="constrained", facecolor="white")
    for section, axes in zip(
        sections, figure.subplots(len(sections), squeeze=False, height_ratios=heights)[:, 0], strict=True
    ):
        for k, name in enumerate(names[section]):
            chosen = [r for r in rows if r.section == section and r.name == name and r.baseline_value]
            offset = (k - (len(names[section]) - 1) / 2) * 0.7 / len(names[section])
            axes.errorbar(
                [r.ratio for r in chosen],
                [cases[section].index(r.case) + offset for r in chosen],
                xerr=[[r.ratio - r.low for r in chosen], [r.high - r.ratio for r in chosen]],
                fmt=_MARKS[k % len(_MARKS)],
                color=_COLOURS[k % len(_COLOURS)],
                label=f"{name} / {chosen[0].baseline}" if chosen else None,
                markersize=5,
                elinewidth=2,
            )
        axes.set_yticks(range(len(cases[section])), cases[section])
        axes.set_ylim(len(cases[section]) - 0.4, -0.6)
        axes.set_xlabel("ratio to the baseline (median and quartiles)")
        labels = axes.get_legend_handles_labels()[1]
        columns = 1 if any(len(label) > 60 for label in labels) else 2
        axes.set_title(section, loc="left", pad=8 + 14 * -(-len(labels) // columns), fontweight="bold")
        axes.axvline(1.0, color="0.4", linewidth=1.0)
        if axes.get_xlim()[1] > 1.7 and section == "Step":
            axes.axvline(2.0, color="0.4", linewidth=1.0, linestyle="--")  # two passes
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False, fontsize=8)
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=110)
