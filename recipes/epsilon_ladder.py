"""How epsilon and inner_lr move with the width of the network, the batch size and the training length.

    python recipes/epsilon_ladder.py --data_root DATA  # run what is missing, around reproduce.py's CPU scale
    python recipes/epsilon_ladder.py --ledger recipes/ledger.jsonl --table  # into the guide CHOOSING_EPSILON.md

recipes/reproduction/ladder.yaml has the rungs. On each rung, ERM and AMP at a few strengths, which multiply epsilon and
inner_lr alike, are trained and judged on held-out training images. Runs go to a ledger as those of reproduce.py do.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from guides.page import run_script, write_part
from guides.page import table as markdown_table
from reproduction import records
from reproduction.cells import Cell, Selection
from reproduction.plain import read_yaml
from reproduction.scale import Scale, read_scale
from reproduction.sweep import Sweep

from amp_plugin.arguments import Parser, path
from amp_plugin.report.style import BLUE, VERMILION, picture

HERE = Path(__file__).resolve().parent
MARK = "epsilon-ladder"
PICTURE = "epsilon_ladder.png"
ALT = "Validation NLL and error of every rung against the strength"
_MEASURES = {"eval_nll": ("validation NLL", 3), "eval_error": ("validation error %", 2)}

# Metrics by rung and strength; the strength 0 is ERM.
Found = dict[str, dict[float, dict[str, float]]]


@cache
def ladder() -> dict[str, Any]:
    """Read ladder.yaml."""
    data: dict[str, Any] = read_yaml(HERE / "reproduction" / "ladder.yaml")
    return data


def strengths(rung: str) -> list[float]:
    """Return the strengths that are tried on a rung."""
    found: list[float] = ladder()["rungs"][rung].get("strengths", ladder()["strengths"])
    return found


def rungs() -> dict[str, tuple[Scale, dict[float, Cell]]]:
    """Return the scale and the runs of each rung, by strength; the strength 0 is ERM."""
    data, base = ladder(), read_scale("cpu")
    ((model, args),), tuning = base.models.items(), base.tuning
    if tuning is None:
        raise ValueError(f"{base.path} has no held-out images")
    found = {}
    for name, rung in data["rungs"].items():
        # Rounded, so that 3 * 0.2 is 0.6 in the ledger.
        balls = [{f"amp_{key}": round(s * data[key], 10) for key in ("epsilon", "inner_lr")} for s in strengths(name)]
        trials: dict[str, list[dict[str, Any]]] = {"erm": [{}], "amp": balls}
        scale = replace(
            base,
            models={model: {**args, **rung.get("model", {})}},
            datasets=["cifar10"],
            options={**base.options, **rung.get("options", {})},
            methods=list(trials),
            tuning=replace(tuning, trials=trials, carried={}),
        )
        found[name] = scale, dict(zip((0.0, *strengths(name)), Selection(scale).trials(), strict=True))
    return found


def found_in(ledger: Path) -> Found:
    """Return the figures of the rungs that have runs in a ledger, of which there must be one."""
    runs = records.read(ledger)
    figures = {
        name: {s: run["metrics"] for s, cell in cells.items() if (run := records.find(cell, scale, runs))}
        for name, (scale, cells) in rungs().items()
    }
    found = {name: some for name, some in figures.items() if some}
    if not found:
        raise ValueError(f"{ledger} has no runs of the ladder; run it first, or name their --ledger")
    return found


def best(runs: dict[float, dict[str, float]], measure: str) -> float:
    """Return the strength with the lowest value of a measure."""
    return min(runs, key=lambda strength: records.known(runs[strength], measure))


def table(found: Found) -> str:
    """Render a row for each rung and strength; the lowest of a rung whose strengths have all been run is bold."""
    rows = []
    for name, runs in found.items():
        whole = len(runs) == 1 + len(strengths(name))
        for strength, metrics in runs.items():
            ball = [f"{strength * ladder()[key]:g}" for key in ("epsilon", "inner_lr")] if strength else ["ERM", "-"]
            if strength == ladder()["rungs"][name].get("predicted"):
                ball[0] += ", predicted"
            row = [name, *ball]
            for measure, (_, digits) in _MEASURES.items():
                mark = "**" if whole and strength == best(runs, measure) else ""
                row.append(f"{mark}{records.known(metrics, measure):.{digits}f}{mark}")
            rows.append([*row, f"{records.known(metrics, 'loss'):.3f}"])
    return markdown_table(
        ["rung", "epsilon", "inner_lr", *(head for head, _ in _MEASURES.values()), "train loss"], rows
    )


def draw(found: Found, path: Path) -> None:
    """Draw NLL and error against the strength to a PNG, a panel a rung; a dashed line shows ERM."""
    title = "AMP by its strength, on each rung"
    with picture(path, title, (1.7 * len(found) + 1, 4.8), figures=table(found)) as figure:
        grid: Any = figure.subplots(len(_MEASURES), len(found), sharey="row", squeeze=False)
        for row, (measure, (head, _)) in zip(grid, _MEASURES.items(), strict=True):
            row[0].set_ylabel(head)
            for axes, (name, runs) in zip(row, found.items(), strict=True):
                points = [(strength, records.known(metrics, measure)) for strength, metrics in runs.items() if strength]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=BLUE, markersize=4, label="AMP")
                if 0.0 in runs:
                    axes.axhline(
                        records.known(runs[0.0], measure), color=VERMILION, linestyle="--", linewidth=1, label="ERM"
                    )
                ticks = strengths(name)
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
                axes.set_xlim(0.8 * min(ticks), 1.25 * max(ticks))
                axes.set_title(name, fontsize=10)
        figure.supxlabel("strength, by which epsilon and inner_lr of the base are multiplied", fontsize=9)
        grid[0][0].legend(frameon=False, fontsize="small")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data_root", type=path, metavar="DIR", help="Folder of the data sets; default: the Hub.")
    parser.add_argument("--output_dir", type=path, default=Path("runs/ladder"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--ledger", type=path, metavar="FILE", help="JSON Lines; default: in --output_dir.")
    parser.add_argument("--rungs", nargs="+", metavar="NAME", help='E.g. "width 8"; default: all.')
    parser.add_argument("--table", action="store_true", help="Render what the ledger has, into the page.")
    parser.add_argument("--page", type=path, default=HERE / "guides" / "CHOOSING_EPSILON.md", metavar="FILE")
    args: argparse.Namespace = parser.parse_args(argv)
    args.ledger = args.ledger or args.output_dir / "ledger.jsonl"
    if unknown := set(args.rungs or ()) - rungs().keys():
        parser.error(f"--rungs {', '.join(sorted(unknown))}: there are {', '.join(rungs())}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run, or render."""
    args = parse(argv)
    if args.table:
        found = found_in(args.ledger)
        write_part(args.page, MARK, table(found), partial(draw, found), PICTURE, ALT)
        print(f"{args.page}: {sum(map(len, found.values()))} runs of {len(found)} rungs\n{args.page.parent / PICTURE}")
        return
    for name, (scale, cells) in rungs().items():
        if args.rungs is None or name in args.rungs:
            print(name)
            sweep = Sweep(scale, args.ledger, args.output_dir, args.data_root)
            sweep.check()
            sweep.run(list(cells.values()))
            if sweep.failures:
                sys.exit("\n".join(map(str, sweep.failures)))


if __name__ == "__main__":
    run_script(main)
