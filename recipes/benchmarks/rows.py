"""A measured figure beside its baseline's, and the statistics of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: the subject it belongs to.
        case: the setting, the same for a figure and its baseline.
        name: what was measured.
        baseline: what it is a ratio to.
        value: median of what was measured, in ``unit``.
        baseline_value: median of the baseline, in ``unit``.
        unit: of both; of a rate or a duration.
        ratio: median of the ratios of the single rounds.
        low: their lower quartile.
        high: their upper quartile.
        rounds: how many rounds; 1 for what is counted, not timed.
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
    """A row from rounds in each of which the figure and its baseline were measured one after the other."""
    ratios = [a / b for a, b in zip(values, baselines, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Row(
        section, case, name, baseline, median(values), median(baselines), unit, median(ratios), low, high, len(ratios)
    )


def counted(section: str, case: str, name: str, baseline: str, value: float, base: float, unit: str) -> Row:
    """A row of exact figures; the ratio is 0 where there is nothing to compare with."""
    ratio = value / base if base else 0.0
    return Row(section, case, name, baseline, value, base, unit, ratio, ratio, ratio, 1)


def markdown(rows: Sequence[Row]) -> str:
    """One table a section, all with the same columns."""
    lines = []
    for section in dict.fromkeys(row.section for row in rows):
        lines += [
            "",
            f"### {section}",
            "",
            "| case | measured | against | ratio | quartiles | measured | against | unit | rounds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            if row.section == section:
                ratio = f"{row.ratio:.3f}" if row.baseline_value else "-"
                spread = f"{row.low:.3f} to {row.high:.3f}" if row.rounds > 1 else "exact"
                lines.append(
                    f"| {row.case} | {row.name} | {row.baseline} | {ratio} | {spread} | {_short(row.value)}"
                    f" | {_short(row.baseline_value)} | {row.unit} | {row.rounds} |"
                )
    return "\n".join(lines[1:])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
