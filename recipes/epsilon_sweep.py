"""How epsilon and inner_lr matter: a table and a picture from the runs in a ledger, put into the guide about them.

    python recipes/epsilon_sweep.py                  # from recipes/ledger.jsonl into recipes/guides/CHOOSING_EPSILON.md
    python recipes/epsilon_sweep.py --ledger runs/ledger.jsonl --page my_page.md

Takes the runs of one data set that report on held-out training images (`train.py --validation_images N --ledger FILE`).
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from guides.marked import replace

from amp_plugin.data.settings import BUNDLED
from amp_plugin.report import read_ledger
from amp_plugin.report.style import BLUE, VERMILION, picture

HERE = Path(__file__).resolve().parent
MARK = "epsilon-sweep"
PICTURE = "epsilon_sweep.png"
_VARIED = ("optim", "amp_epsilon", "amp_inner_lr", "seed")
_MEASURES = ("eval_nll", "eval_error", "eval_ece", "loss", "sharpness", "clipped")
_SHOWN = {"eval_nll": "validation NLL", "eval_error": "validation error (%)"}

Run = dict[str, Any]


class Setting(NamedTuple):
    """What a row of the table is about; both are 0 for SGD alone.

    Attributes:
        epsilon: radius of the ball.
        inner_lr: step length of the ascent.
    """

    epsilon: float
    inner_lr: float


Sweep = dict[Setting, list[Run]]
SGD = Setting(0.0, 0.0)


def read(ledger: Path, dataset: str = BUNDLED) -> Sweep:
    """The runs of the sweep in a ledger, by setting.

    Args:
        ledger: the JSON Lines file.
        dataset: that they were trained on.

    Raises:
        FileNotFoundError: there is no such ledger.
        ValueError: it has none of them; or they differ in more than AMP's two settings and the seed, so that they
            cannot be compared; or one was run twice.
    """
    runs = [
        r for r in read_ledger(ledger) if r["settings"].get("validation_images") and r["settings"]["dataset"] == dataset
    ]
    if not runs:
        raise ValueError(f"{ledger} has no runs on {dataset} with validation_images")
    common = [{k: v for k, v in run["settings"].items() if k not in _VARIED} for run in runs]
    for other in common:
        if differing := sorted(k for k in {*other, *common[0]} if other.get(k) != common[0].get(k)):
            raise ValueError(f"{ledger}: runs with validation_images differ in {', '.join(differing)}; keep one kind")
    sweep: Sweep = defaultdict(list)
    for run in runs:
        settings = run["settings"]
        key = Setting(settings["amp_epsilon"], settings["amp_inner_lr"]) if settings["optim"] == "amp" else SGD
        if any(settings["seed"] == other["settings"]["seed"] for other in sweep[key]):
            raise ValueError(f"{ledger}: {settings['optim']} {key}, seed {settings['seed']}, is there twice")
        sweep[key].append(run)
    return dict(sorted(sweep.items()))


def values(runs: Sequence[Run], measure: str) -> list[float]:
    """One measure of each run that has it."""
    return [run["metrics"][measure] for run in runs if measure in run["metrics"]]


def table(sweep: Sweep) -> str:
    """A row for each setting: mean and, of several seeds, standard deviation."""
    lines = [
        "| epsilon | inner_lr | seeds | validation NLL | validation error % | validation ECE | train loss | sharpness"
        " | clipped |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setting, runs in sweep.items():
        names = "| SGD | - " if setting == SGD else f"| {setting.epsilon:g} | {setting.inner_lr:g} "
        cells = [_cell(values(runs, m), 1 if m == "eval_error" else 3) for m in _MEASURES]
        lines.append(f"{names}| {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(sweep: Sweep) -> str:
    """What stands in the page: the picture and the table."""
    return f"![Validation NLL and error against inner_lr and epsilon]({PICTURE})\n\n{table(sweep)}"


def draw(sweep: Sweep, path: Path) -> None:
    """NLL and error on held-out images, against each of the two settings while the other is held.

    Args:
        sweep: the runs; not empty.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
    """
    title = "Line: mean over seeds; points: the seeds; band: SGD, all seeds"
    with picture(path, title, (9, 6.4), figures=table(sweep)) as figure:
        grid: Any = figure.subplots(2, 2, sharey="row", sharex="col")
        for row, (measure, name) in zip(grid, _SHOWN.items(), strict=True):
            row[0].set_ylabel(name)
            for axes, varied, held in zip(row, Setting._fields, reversed(Setting._fields), strict=True):
                _lines(axes, sweep, measure, varied, held)
        for axes, varied in zip(grid[-1], Setting._fields, strict=True):
            axes.set_xlabel(varied)
            axes.set_xscale("log")
            tried = sorted({getattr(s, varied) for s in sweep if s != SGD})
            axes.set_xticks(tried, [f"{x:g}" for x in tried])
            axes.minorticks_off()


def _lines(axes: Any, sweep: Sweep, measure: str, varied: str, held: str) -> None:
    """A measure against one setting, a line for each value of the other, and SGD's."""
    if SGD in sweep:
        reference = values(sweep[SGD], measure)
        axes.axhspan(min(reference), max(reference), color="0.6", alpha=0.3, linewidth=0)
        axes.axhline(mean(reference), color="0.4", linestyle="--", label="SGD")
    for level, colour in zip(_levels(sweep, held), (BLUE, VERMILION), strict=False):
        line = sorted(
            (getattr(s, varied), values(runs, measure)) for s, runs in sweep.items() if getattr(s, held) == level
        )
        axes.plot([x for x, _ in line], [mean(ys) for _, ys in line], color=colour, label=f"AMP, {held} {level:g}")
        for x, ys in line:
            axes.plot([x] * len(ys), ys, "o", color=colour, markersize=4, alpha=0.6)
    axes.legend(frameon=False, fontsize="small")


def _levels(sweep: Sweep, held: str) -> list[float]:
    """The values of a setting along which the other was varied, most runs first; a line needs three points."""
    counts: dict[float, int] = defaultdict(int)
    for setting in sweep:
        if setting != SGD:
            counts[getattr(setting, held)] += 1
    return [level for level, n in sorted(counts.items(), key=lambda item: -item[1]) if n >= 3][:2]


def _cell(numbers: Sequence[float], digits: int) -> str:
    if not numbers:
        return "-"
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, default=HERE / "ledger.jsonl", help="JSON Lines file of the runs.")
    parser.add_argument("--dataset", default=BUNDLED, help="What the runs were trained on.")
    parser.add_argument(
        "--page",
        type=Path,
        default=HERE / "guides" / "CHOOSING_EPSILON.md",
        help="Markdown with the marks of the sweep.",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Render."""
    args = parse(argv)
    sweep, drawn = read(args.ledger, args.dataset), args.page.parent / PICTURE
    replace(args.page, MARK, section(sweep), partial(draw, sweep, drawn))
    print(f"{args.page}: {sum(map(len, sweep.values()))} runs of {len(sweep)} settings\n{drawn}")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
