"""The picture of what `benchmarks.device` has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from amp_plugin.report.style import AMBER, BLUE, GREEN, PINK, VERMILION, legend_below, picture
from benchmarks.device_times import Row

WAYS = {"SGD": BLUE, "AMP": VERMILION, "AMP, attach": PINK, "SAM": GREEN, "SAM of pytorch_optimizer": AMBER}
MARKERS = dict(zip(WAYS, "osD^v", strict=True))
PANELS = {"ms": "milliseconds a step", "tflops": "TFLOP/s", "ratio": "ratio to SGD's step"}


def draw(rows: list[Row], path: Path) -> None:
    """Draw a panel for times, rates and ratios, as far as they are there; a row of points is a case of steps.

    The device's own ceilings are dashed lines. Later rows of a case take the place of earlier ones.
    """
    machines = [row["machine"] for row in rows if "machine" in row]
    steps = {(case_of(r), r["way"]): r for r in rows if r.get("part", "").startswith("step") and "ratio" in r}
    cases = list(dict.fromkeys(case for case, _ in steps))
    if not cases:
        return
    limits = {row["ceiling"]: row["tflops"] for row in rows if "ceiling" in row and "tflops" in row}
    panels = {name: label for name, label in PANELS.items() if any(name in row for row in steps.values())}
    where = machines[-1] if machines else {}
    title = ", ".join(f"{k} {v}" if k == "torch" else str(v) for k, v in where.items() if k in ("device", "torch"))
    with picture(path, title, (4.2 * len(panels) + 1.5, 1.6 + 0.33 * len(cases))) as figure:
        columns: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (name, label) in zip(columns, panels.items(), strict=True):
            for way, colour in WAYS.items():
                found = [(cases.index(case), row) for (case, of), row in steps.items() if of == way and name in row]
                if found:
                    y, values = [i for i, _ in found], [row[name] for _, row in found]
                    axes.plot(values, y, MARKERS[way], color=colour, label=way, markersize=5)
            for precision, value in limits.items() if name == "tflops" else ():
                axes.axvline(value, color="0.4", linestyle="--", linewidth=1.0)
                axes.annotate(f"{precision} product", (value, -0.5), fontsize=7, rotation=90, ha="right", va="top")
            axes.set(xlabel=label, yticks=range(len(cases)), yticklabels=cases, ylim=(len(cases) - 0.4, -0.6))
            if name == "ms":
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        legend_below(figure)


def case_of(row: Row) -> str:
    """Name the case of a row."""
    return f"batch {row['batch']}, {row['precision']}, {row['mode']}"
