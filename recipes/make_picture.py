"""The README's picture, for light and dark pages, from the ledger: python recipes/make_picture.py

The picture shows ERM and AMP at the CPU's scale, whose networks learn their images by heart, and on full CIFAR-10 in
four epochs, which is far from that: every seed is a point.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from reproduction.cells import Selection
from reproduction.comparison import reference_of, rows_of
from reproduction.scale import read_scale

from amp_plugin.report import read_ledger
from amp_plugin.report.style import AMBER, SKY, stamp

HERE = Path(__file__).resolve().parent
LEDGER = HERE / "ledger.jsonl"
PICTURES = {theme: HERE / "guides" / f"results-{theme}.svg" for theme in ("light", "dark")}
HEART = "learns its data by heart:\n2,000 images of {}, 30 epochs"
FAR = "far from fitting its data:\nfull CIFAR-10, 4 epochs"
JOBS = (HEART.format("CIFAR-10"), HEART.format("CIFAR-100"), FAR)
OPTIMS = {"erm": "sgd", "amp": "amp"}
MEASURES = {"eval_error": "test error (%)", "eval_nll": "test NLL", "eval_ece": "test calibration error (ECE)"}
_INK = {"light": "#24292f", "dark": "#e6edf3"}
_COLOURS = {"sgd": SKY, "amp": AMBER}
_FAR = {"dataset": "cifar10", "num_train_epochs": 4, "validation_images": None, "train_images": None}

Points = dict[tuple[str, str, str], list[float]]


def points(ledger: Path = LEDGER) -> Points:
    """Return the figures of every run, by job, optimizer and measure."""
    runs = read_ledger(ledger)
    found: Points = {}
    for setting, rows in rows_of(Selection(read_scale("cpu"), methods=list(OPTIMS)), runs).items():
        job = HEART.format(setting.dataset.replace("cifar", "CIFAR-"))
        for method, optim in OPTIMS.items():
            if most := reference_of(rows, method):
                found |= {(job, optim, measure): most.numbers(measure) for measure in MEASURES}
    for run in runs:
        if all(run["settings"].get(k) == v for k, v in _FAR.items()):
            for measure in MEASURES:
                found.setdefault((FAR, run["settings"]["optim"], measure), []).append(run["metrics"][measure])
    return found


def listed(data: Points) -> str:
    """Return the figures as a text, a line each, which the pictures are stamped with."""
    return "\n".join(map(str, sorted(data.items())))


def draw(data: Points, theme: str) -> Any:
    """Draw a row of points and a bar at their mean for each job and optimizer, one panel a measure."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    ink = _INK[theme]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    heights = {(job, optim): -2.6 * j - k for j, job in enumerate(JOBS) for k, optim in enumerate(_COLOURS)}
    axes: Any
    for axes, (measure, name) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES.items(), strict=True):
        for (job, optim), height in heights.items():
            values = data[job, optim, measure]
            axes.plot(values, [height] * len(values), "o", color=_COLOURS[optim], markersize=7, alpha=0.8)
            axes.plot([mean(values)] * 2, [height - 0.32, height + 0.32], color=_COLOURS[optim], linewidth=2)
        axes.set_xlim(left=0)
        axes.set_xlabel(name, color=ink)
        axes.set_yticks([*heights.values()], [optim.upper() for _, optim in heights])
        axes.set_ylim(min(heights.values()) - 0.6, 0.6)
        axes.tick_params(colors=ink)
        axes.grid(axis="x", color=ink, alpha=0.15)
        axes.set_facecolor("none")
        axes.spines[:].set(color=ink, alpha=0.3)
    for job in JOBS:
        axes, middle = figure.axes[0], mean(heights[job, optim] for optim in _COLOURS)
        axes.text(-0.24, middle, job, color=ink, ha="right", va="center", transform=axes.get_yaxis_transform())
    figure.patch.set_alpha(0.0)
    return figure


def main() -> None:
    """Draw both pictures."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "amp_plugin"  # the same figures give the same file
    data = points()
    for theme, path in PICTURES.items():
        draw(data, theme).savefig(path, metadata={**stamp(listed(data)), "Date": None})
        print(path)


if __name__ == "__main__":
    main()
