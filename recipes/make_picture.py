"""The README's picture, for light and dark pages, from the ledger: python recipes/make_picture.py

The picture shows by how much AMP's test error and NLL are lower than SGD's at the CPU's scale, seed by seed: every pair
of runs is a point, and a line is the 95 % interval of their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from guides.page import run_script
from reproduction.cells import Selection
from reproduction.comparison import Row, interval, reference_of, rows_of
from reproduction.published import Setting, methods
from reproduction.scale import read_scale

from amp_plugin.arguments import Parser
from amp_plugin.report import read_ledger
from amp_plugin.report.style import AMBER, GREEN, SKY, stamp

HERE = Path(__file__).resolve().parent
LEDGER = HERE / "ledger.jsonl"
PICTURES = {theme: HERE / "guides" / f"results-{theme}.svg" for theme in ("light", "dark")}
METHODS = {"amp": AMBER, "amp_subset": GREEN, "amp_split4": SKY}
MEASURES = {"eval_error": "test error, points below SGD's", "eval_nll": "test NLL, nats below SGD's"}
_INK = {"light": "#24292f", "dark": "#e6edf3"}

# By the line's label and the measure: SGD's figure minus the method's, for each seed that both have.
Differences = dict[tuple[str, str], list[float]]


def differences(ledger: Path = LEDGER) -> Differences:
    """Return what the picture shows, line by line."""
    chosen = Selection(read_scale("cpu"), methods=list(METHODS))
    tables = rows_of(chosen, read_ledger(ledger))
    return {
        (label, measure): numbers
        for setting, rows in tables.items()
        for label, row in _lines(setting, rows).items()
        for measure in MEASURES
        if len(numbers := _minus(reference_of(rows), row, measure)) > 1
    }


def _lines(setting: Setting, rows: Sequence[Row]) -> dict[str, Row]:
    """Return the rows of a setting, by the label of a line."""
    found = {method: reference_of(rows, method) for method in METHODS}
    return {f"{setting.dataset}: {method}": row for method, row in found.items() if row is not None}


def _minus(reference: Row | None, row: Row, measure: str) -> list[float]:
    theirs, ours = {} if reference is None else reference.measured(measure), row.measured(measure)
    return [theirs[seed] - ours[seed] for seed in sorted(theirs.keys() & ours.keys())]


def listed(data: Differences) -> str:
    """Return the figures as a text, a line each, which the pictures are stamped with."""
    return "\n".join(map(str, sorted(data.items())))


def draw(data: Differences, theme: str) -> Any:
    """Draw a row for each data set and method, one panel a measure: the pairs, their mean, and its 95 % interval."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    ink, labels = _INK[theme], list(dict.fromkeys(label for label, _ in data))
    heights = _heights(labels)
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(labels)), layout="constrained")
    axes: Any
    for axes, (measure, name) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES.items(), strict=True):
        axes.axvline(0, color=ink, linewidth=1, alpha=0.7)
        for label in labels:
            numbers, height = data[label, measure], heights[label]
            colour = METHODS[label.partition(": ")[2]]
            if found := interval(numbers):
                axes.plot([found.low, found.high], [height] * 2, color=colour, linewidth=3, solid_capstyle="round")
            axes.plot(numbers, [height] * len(numbers), "o", color=colour, markersize=5, alpha=0.6)
            axes.plot([mean(numbers)], [height], "D", color=colour, markeredgecolor=ink, markersize=7)
        axes.set_xlabel(name, color=ink)
        axes.set_yticks([heights[label] for label in labels], [_shown(label) for label in labels])
        axes.set_ylim(min(heights.values()) - 0.7, 0.7)
        axes.tick_params(colors=ink)
        axes.grid(axis="x", color=ink, alpha=0.15)
        axes.set_facecolor("none")
        axes.spines[:].set(color=ink, alpha=0.3)
    figure.patch.set_alpha(0.0)
    return figure


def _heights(labels: Sequence[str]) -> Mapping[str, float]:
    """Return the place of each line, with a gap between data sets."""
    sets = list(dict.fromkeys(label.partition(": ")[0] for label in labels))
    return {label: -float(k) - 0.7 * sets.index(label.partition(": ")[0]) for k, label in enumerate(labels)}


def _shown(label: str) -> str:
    dataset, _, method = label.partition(": ")
    return f"{dataset.replace('cifar', 'CIFAR-')}, {methods()[method].label.replace('AMP, ', 'AMP ')}"


def main() -> None:
    """Draw both pictures."""
    Parser(description=__doc__).parse_args()
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "amp_plugin"  # the same figures give the same file
    data = differences()
    for theme, path in PICTURES.items():
        draw(data, theme).savefig(path, metadata={**stamp(listed(data)), "Date": None})
        print(path)


if __name__ == "__main__":
    run_script(main)
