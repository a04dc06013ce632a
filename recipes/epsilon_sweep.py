"""How epsilon and inner_lr matter: a table and a picture from the runs in a ledger, put into the guide about them.

    python recipes/epsilon_sweep.py                  # from recipes/ledger.jsonl into recipes/guides/CHOOSING_EPSILON.md
    python recipes/epsilon_sweep.py --ledger runs/ledger.jsonl --page my_page.md

The script takes the runs of one data set that report on held-out training images
(`train.py --validation_images N --ledger FILE`).
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from guides.page import run_script, write_part
from guides.page import table as markdown_table
from reproduction.comparison import Row
from reproduction.records import is_trial
from reproduction.table import spread

from amp_plugin.arguments import Parser, path
from amp_plugin.data.settings import BUNDLED
from amp_plugin.report import read_ledger
from amp_plugin.report.style import BLUE, VERMILION, picture

HERE = Path(__file__).resolve().parent
MARK = "epsilon-sweep"
PICTURE = "epsilon_sweep.png"
ALT = "Validation NLL and error against inner_lr and epsilon"
_VARIED = ("optim", "amp_epsilon", "amp_inner_lr", "seed")
_MEASURES = {  # by metric: heading and digits
    "eval_nll": ("validation NLL", 3),
    "eval_error": ("validation error %", 1),
    "eval_ece": ("validation ECE", 3),
    "loss": ("train loss", 3),
    "sharpness": ("sharpness", 3),
    "clipped": ("clipped", 3),
}
_SHOWN = {"eval_nll": "validation NLL", "eval_error": "validation error (%)"}


class Setting(NamedTuple):
    """AMP's two settings: the radius of the ball and the step length of the ascent; both are 0 for SGD alone."""

    epsilon: float
    inner_lr: float


Sweep = dict[Setting, Row]
SGD = Setting(0.0, 0.0)


def read(ledger: Path, dataset: str = BUNDLED) -> Sweep:
    """Return the runs of the sweep on a data set in a ledger, by setting; all must be comparable, each there once."""
    runs = [run for run in read_ledger(ledger) if is_trial(run) and run["settings"].get("dataset") == dataset]
    if not runs:
        raise ValueError(f"{ledger} has no runs on {dataset} with validation_images")
    first, *others = [{k: v for k, v in run["settings"].items() if k not in _VARIED} for run in runs]
    if differing := {k for other in others for k in {*first, *other} if first.get(k) != other.get(k)}:
        raise ValueError(
            f"{ledger}: runs with validation_images differ in {', '.join(sorted(differing))}; keep one kind"
        )
    sweep: Sweep = {}
    for run in runs:
        settings = run["settings"]
        optim = settings.get("optim", "sgd")
        try:
            key = Setting(*(float(settings[f"amp_{name}"]) for name in Setting._fields)) if optim == "amp" else SGD
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{ledger}: a run with AMP does not tell its epsilon and inner_lr ({error!r})") from None
        row = sweep.setdefault(key, Row(optim, key._asdict()))
        if settings["seed"] in row.runs:
            raise ValueError(f"{ledger}: {optim} {key}, seed {settings['seed']}, is there twice")
        row.runs[settings["seed"]] = run
    return dict(sorted(sweep.items()))


def table(sweep: Sweep) -> str:
    """Render a row for each setting: the mean and, of several seeds, the standard deviation."""
    rows = []
    for setting, row in sweep.items():
        names = ["SGD", "-"] if setting == SGD else [f"{setting.epsilon:g}", f"{setting.inner_lr:g}"]
        cells = [spread(row.numbers(measure), digits) for measure, (_, digits) in _MEASURES.items()]
        rows.append([*names, str(len(row.runs)), *cells])
    return markdown_table(["epsilon", "inner_lr", "seeds", *(head for head, _ in _MEASURES.values())], rows)


def draw(sweep: Sweep, path: Path) -> None:
    """Draw NLL and error on held-out images against each of the two settings while the other is held, to a PNG."""
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
    """Draw a measure against one setting, a line for each of two values of the other setting, and SGD's measure."""
    if SGD in sweep and (reference := sweep[SGD].numbers(measure)):
        axes.axhspan(min(reference), max(reference), color="0.6", alpha=0.3, linewidth=0)
        axes.axhline(mean(reference), color="0.4", linestyle="--", label="SGD")
    counts = Counter(getattr(setting, held) for setting in sweep if setting != SGD)
    levels = [level for level, n in counts.most_common() if n >= 3]  # a line needs three points
    for level, colour in zip(levels, (BLUE, VERMILION), strict=False):
        on_line = {getattr(s, varied): row.numbers(measure) for s, row in sweep.items() if getattr(s, held) == level}
        line = sorted((x, ys) for x, ys in on_line.items() if ys)
        axes.plot([x for x, _ in line], [mean(ys) for _, ys in line], color=colour, label=f"AMP, {held} {level:g}")
        for x, ys in line:
            axes.plot([x] * len(ys), ys, "o", color=colour, markersize=4, alpha=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    page = HERE / "guides" / "CHOOSING_EPSILON.md"
    parser.add_argument("--ledger", type=path, default=HERE / "ledger.jsonl", help="JSON Lines file of the runs.")
    parser.add_argument("--dataset", default=BUNDLED, help="What the runs were trained on.")
    parser.add_argument("--page", type=path, default=page, help="Markdown with the marks of the sweep.")
    args: argparse.Namespace = parser.parse_args(argv)
    return args


def main(argv: list[str] | None = None) -> None:
    """Render."""
    args = parse(argv)
    sweep = read(args.ledger, args.dataset)
    write_part(args.page, MARK, table(sweep), partial(draw, sweep), PICTURE, ALT)
    runs = sum(len(row.runs) for row in sweep.values())
    print(f"{args.page}: {runs} runs of {len(sweep)} settings\n{args.page.parent / PICTURE}")


if __name__ == "__main__":
    run_script(main)
