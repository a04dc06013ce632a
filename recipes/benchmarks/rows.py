"""Measured figures beside their baselines', as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from guides.page import table


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: subject that the figure belongs to.
        case: setting, equal for a figure and its baseline.
        name: what was measured.
        baseline: what the ratio compares with.
        value: median of what was measured, in `unit`.
        baseline_value: median of the baseline, in `unit`.
        unit: unit of both, of a rate or of a duration.
        ratio: median of the ratios of the single rounds; 0 where the baseline is 0.
        low: lower quartile of the ratios.
        high: upper quartile of the ratios.
        rounds: number of rounds; 1 for what is counted, not timed.
    """

    section: str
    case: str
    name: str
    baseline: str
    value: float
    baseline_value: float
    unit: str
    ratio: float
    low: float
    high: float
    rounds: int


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
