"""Measured figures beside their baselines': the rows of a table, and their ratios as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from guides.page import table
from matplotlib.axes import Axes  # imported here: without matplotlib the benchmark shall not even start

from amp_plugin.report.style import AMBER, BLUE, GREEN, PINK, SKY, VERMILION, picture

_STYLES: list[dict[str, Any]] = [
    {"color": c, "fmt": m} for c, m in zip((BLUE, VERMILION, GREEN, PINK, AMBER, SKY), "osD^vP", strict=True)
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str  # subject that the figure belongs to
    case: str  # setting, equal for a figure and its baseline
    name: str  # what was measured
    baseline: str  # what the ratio compares with
    value: float  # median of what was measured, in `unit`
    baseline_value: float  # median of the baseline, in `unit`
    unit: str  # unit of both, of a rate or of a duration
    ratio: float  # median of the ratios of the single rounds; 0 where the baseline is 0
    low: float  # lower quartile of the ratios
    high: float  # upper quartile of the ratios
    rounds: int  # 1 for what is counted, not timed


def timed(
    section: str, case: str, name: str, baseline: str, values: Sequence[float], baselines: Sequence[float], unit: str
) -> Row:
    """Return a row from rounds in each of which the figure and its baseline were measured one after the other."""
    ratios = [a / b for a, b in zip(values, baselines, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(
        section, case, name, baseline, median(values), median(baselines), unit, median(ratios), low, high, len(ratios)
    )


def counted(section: str, case: str, name: str, baseline: str, value: float, base: float, unit: str) -> Row:
    """Return a row of exact figures."""
    ratio = value / base if base else 0.0
    return Row(section, case, name, baseline, value, base, unit, ratio, ratio, ratio, 1)


def markdown(rows: Sequence[Row]) -> str:
    """Render the rows in Markdown, a table for each section."""
    heads = ["case", "measured", "against", "ratio", "quartiles", "measured", "against", "unit", "rounds"]
    sections: dict[str, list[list[str]]] = {}
    for row in rows:
        ratio = f"{row.ratio:.3f}" if row.baseline_value else "-"
        spread = f"{row.low:.3f} to {row.high:.3f}" if row.rounds > 1 else "exact"
        figures = [ratio, spread, _short(row.value), _short(row.baseline_value), row.unit, str(row.rounds)]
        sections.setdefault(row.section, []).append([row.case, row.name, row.baseline, *figures])
    return "\n\n".join(f"### {section}\n\n{table(heads, cells)}" for section, cells in sections.items())


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def draw(rows: Sequence[Row], folder: Path, caption: str) -> list[Path]:
    """Draw a picture for each section: by case, a point for the median ratio of each row, a line for its quartiles.

    Returns:
        The files, named after the sections; rows without a ratio are in none.
    """
    sections: dict[str, list[Row]] = {}
    for row in rows:
        if row.baseline_value:
            sections.setdefault(row.section, []).append(row)
    paths = []
    for section, some in sections.items():
        height = 1.8 + 0.11 * len(some) + 0.1 * len({row.case for row in some})
        paths.append(folder / picture_of(section))
        with picture(paths[-1], "", (9.0, height), markdown(some)) as figure:
            _panel(figure.subplots(), section, some)
            figure.supxlabel(caption, fontsize=7)
    return paths


def picture_of(section: str) -> str:
    """Return the name of a section's picture."""
    return f"benchmark-{section.lower().replace(' ', '-')}.png"


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
    columns = 1 if any(len(f"{row.name} / {row.baseline}") > 60 for row in rows) else 2
    axes.set_title(section, loc="left", pad=8 + 14 * -(-len(names) // columns), fontweight="bold")
    axes.axvline(1.0, color="0.4", linewidth=1.0)
    if section == "Step":
        axes.axvline(2.0, color="0.4", linewidth=1.0, linestyle="--")  # two passes
    axes.grid(False, axis="y")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False, fontsize=8)
