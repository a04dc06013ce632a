"""The README's picture, for light and dark pages, from the ledger: python recipes/make_picture.py

ERM and AMP at the CPU's scale, whose networks learn their images by heart, and full CIFAR-10 in four epochs, which is
far from that: every seed a point.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from reproduction.cells import Selection
from reproduction.comparison import rows_of
from reproduction.scale import read_scale

from amp_plugin.report import read_ledger
from amp_plugin.report.style import stamp

HERE = Path(__file__).resolve().parent
LEDGER = HERE / "ledger.jsonl"
PICTURES = {theme: HERE / "guides" / f"results-{theme}.svg" for theme in ("light", "dark")}
HEART = "learns its data by heart:\n2,000 images of {}, 30 epochs"
FAR = "far from fitting its data:\nfull CIFAR-10, 4 epochs"
JOBS = (HEART.format("CIFAR-10"), HEART.format("CIFAR-100"), FAR)
OPTIMS = {"erm": "sgd", "amp": "amp"}
MEASURES = {"eval_error": "test error (%)", "eval_nll": "test NLL", "eval_ece": "test calibration error (ECE)"}
_INK = {"light": "#24292f", "dark": "#e6edf3"}
# Okabe and Ito's, which the colour-blind tell apart, on white and on black.
_COLOURS = {"sgd": "#56B4E9", "amp": "#E69F00"}
_FAR = {"dataset": "cifar10", "num_train_epochs": 4, "validation_images": None, "train_images": None}

Points = dict[tuple[str, str, str], list[float]]


def points(ledger: Path = LEDGER) -> Points:
    """The figures of every run, by job, optimizer and measure."""
    runs = read_ledger(ledger)
    found: Points = {}
    for setting, rows in rows_of(Selection(read_scale("cpu"), methods=list(OPTIMS)), runs).items():
        job = HEART.format(setting.dataset.replace("cifar", "CIFAR-"))
        for method, optim in OPTIMS.items():
            most = max((row for row in rows if row.method == method), key=lambda row: len(row.runs))
            found |= {(job, optim, measure): list(most.measured(measure).values()) for measure in MEASURES}
    for run in runs:
        if all(run["settings"].get(k) == v for k, v in _FAR.items()):
            for measure in MEASURES:
                found.setdefault((FAR, run["settings"]["optim"], measure), []).append(run["metrics"][measure])
    return found


def listed(data: Points) -> str:
    """The figures as a text, a line each, which the pictures are stamped with."""
    return "\n".join(map(str, sorted(data.items())))


def draw(data: Points, theme: str) -> Any:
    """A row of points and a bar at their mean for each job and optimizer; one panel a measure.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    ink = _INK[theme]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = [(job, optim) for job in JOBS for optim in _COLOURS]
    heights = [-k - 0.6 * (k // len(_COLOURS)) for k in range(len(rows))]
    for axes, (measure, name) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES.items(), strict=True):
        for (job, optim), height in zip(rows, heights, strict=True):
            values = data[job, optim, measure]
            axes.plot(values, [height] * len(values), "o", color=_COLOURS[optim], markersize=7, alpha=0.8)
            axes.plot([mean(values)] * 2, [height - 0.32, height + 0.32], color=_COLOURS[optim], linewidth=2)
        axes.set_xlim(left=0)
        axes.set_xlabel(name, color=ink)
        axes.set_yticks(heights, [optim.upper() for _, optim in rows])
        axes.set_ylim(min(heights) - 0.6, 0.6)
        axes.tick_params(colors=ink)
        axes.grid(axis="x", color=ink, alpha=0.15)
        axes.set_facecolor("none")
        for side in axes.spines.values():
            side.set_color(ink)
            side.set_alpha(0.3)
        if measure == next(iter(MEASURES)):
            for k, job in enumerate(JOBS):
                middle = mean(heights[k * len(_COLOURS) : (k + 1) * len(_COLOURS)])
                axes.text(-0.24, middle, job, color=ink, ha="right", va="center", transform=axes.get_yaxis_transform())
    figure.patch.set_alpha(0.0)
    return figure


def main() -> None:
    """Draw both."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "amp_plugin"  # the same figures give the same file
    data = points()
    for theme, path in PICTURES.items():
        draw(data, theme).savefig(path, metadata={**stamp(listed(data)), "Date": None})
        print(path)


if __name__ == "__main__":
    main()
