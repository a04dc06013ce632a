"""Reproduce the tables of the paper: run their cells, choose hyper-parameters, tabulate what has been run.

    python recipes/reproduce.py --scale cpu --data_root DATA --tune  # the trials, on held-out training images
    python recipes/reproduce.py --scale cpu --choose  # the best of them, into cpu_chosen.yaml
    python recipes/reproduce.py --scale cpu --data_root DATA  # the runs that are reported, on the test images
    python recipes/reproduce.py --scale cpu --table
    python recipes/reproduce.py --scale paper --models preactresnet18 --methods erm amp --jobs 2
    python recipes/reproduce.py --scale paper --models preactresnet18 --at_once 3 --minutes 55  # and again, to continue
    python recipes/reproduce.py --scale paper --slurm --sbatch_args="--gres=gpu:1 --time=24:00:00"
    python recipes/reproduce.py --scale paper --plan

A cell is a model, an augmentation, a data set, a method and a seed. What the cells of a scale have in common stands in
recipes/reproduction/SCALE.yaml (or in a file of your own), what a method means in methods.yaml, what the paper
publishes in published.yaml. Cells run seed by seed, ERM and AMP first, so that what is done is of use at any time.

Each cell is a run of train.py under accelerate launch, in a folder of its own with its log. A cell whose run stands in
the ledger is not run again, and a cell that was killed continues from its last checkpoint: give the same command again.
Several sweeps may share a folder; a cell is run by one of them. Cells at once on one GPU are of use where a single run
leaves the GPU waiting for Python, and where their memory fits (train.py --dry_run tells what a run needs).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from guides.page import run_script, write_part, write_whole
from reproduction import beside, price, records, slurm, trade_off
from reproduction.cells import Cell, Selection
from reproduction.choose import choose
from reproduction.comparison import Row, rows_of
from reproduction.published import Setting
from reproduction.scale import PAPER, Scale, check_train_args, read_scale
from reproduction.sweep import Sweep
from reproduction.table import draw, markdown

from amp_plugin.arguments import Parser, number, path, words

# `benchmark.py --only ascents --sizes 0.3M --batch_sizes 50` wrote this file.
BENCHMARK = Path(__file__).with_name("benchmark_ascents.jsonl")
T = TypeVar("T")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    positive = number(float, "(0, inf)")
    what = parser.add_argument_group("what to do; without any of these: run the cells").add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="Run the trials that choose hyper-parameters.")
    what.add_argument("--choose", action="store_true", help="Write the best trials' values to SCALE_chosen.yaml.")
    what.add_argument("--table", action="store_true", help="Render the ledger's runs as Markdown and as a picture.")
    what.add_argument("--trade_off", action="store_true", help="The same of AMP's cheaper modes, against their cost.")
    what.add_argument("--plan", action="store_true", help="Compute what the cells take: passes, FLOPs, GPU hours.")
    cells = parser.add_argument_group("which cells; default: all of the scale")
    cells.add_argument("--scale", default="cpu", metavar="SCALE", help="cpu, paper or a YAML file. [cpu]")
    cells.add_argument("--models", nargs="+", metavar="NAME", help="By the paper's names, e.g. preactresnet18 vgg16.")
    cells.add_argument("--datasets", nargs="+", metavar="NAME", help="cifar10, cifar100, svhn.")
    cells.add_argument("--augment", nargs="+", metavar="NAME", help="plain, cutout, autoaugment, none.")
    cells.add_argument("--methods", nargs="+", metavar="NAME", help="Default: the scale's, or those published.")
    cells.add_argument(
        "--seeds", nargs="+", type=number(int, "[0, inf)"), metavar="SEED", help="Of the runs that are reported."
    )
    how = parser.add_argument_group("how to run them")
    how.add_argument("--data_root", type=path, metavar="DIR", help="Folder of the data sets; default: the Hub.")
    how.add_argument("--output_dir", type=path, default=Path("runs/reproduce"), metavar="DIR", help="[%(default)s]")
    how.add_argument("--ledger", type=path, metavar="FILE", help="JSON Lines. Default: ledger.jsonl in --output_dir.")
    how.add_argument("--list", action="store_true", help="Only list the cells, and which are done.")
    how.add_argument(
        *("--jobs", "--at_once"),
        type=number(int, "[1, 1024]"),
        default=1,
        metavar="N",
        help="Cells at a time: on a GPU each, or several on one that a cell does not fill, or with cores each. [1]",
    )
    how.add_argument(
        "--minutes",
        type=positive,
        metavar="N",
        help="Stop before so many, with checkpoints; the same command continues.",
    )
    how.add_argument("--launch_args", type=words, metavar="TEXT", help="For accelerate launch, instead of the scale's.")
    how.add_argument(
        "--train_args", type=words, default=[], metavar="TEXT", help='More for train.py: --train_args="--bf16 true".'
    )
    cluster = parser.add_argument_group("on a cluster")
    cluster.add_argument("--slurm", action="store_true", help="Submit a job array, a task for each cell to do.")
    cluster.add_argument(
        "--sbatch_args", type=words, default=[], metavar="TEXT", help='E.g. --sbatch_args="--gres=gpu:1".'
    )
    cluster.add_argument("--task", type=int, metavar="I", help="Run the cell of this index alone, as its tasks do.")
    shown = parser.add_argument_group("what --table, --trade_off, --choose and --plan show")
    shown.add_argument(
        "--page", type=path, metavar="FILE", help="Its part between marks is replaced. [one in --output_dir]"
    )
    shown.add_argument("--benchmark", type=path, default=BENCHMARK, metavar="FILE", help="Seconds of the modes' steps.")
    shown.add_argument("--gpu", default=price.Gpu().name, metavar="NAME", help="[%(default)s]")
    shown.add_argument(
        "--peak_tflops", type=positive, default=price.Gpu().peak / 1e12, metavar="X", help="[%(default)s]"
    )
    shown.add_argument(
        "--utilisation",
        type=number(float, "(0, 1]"),
        default=price.Gpu().utilisation,
        metavar="X",
        help="[%(default)s]",
    )
    args: argparse.Namespace = parser.parse_args(argv)
    args.ledger = args.ledger or args.output_dir / "ledger.jsonl"
    return args


def main(argv: list[str] | None = None) -> None:
    """Do what is asked for."""
    args = parse(argv)
    check_train_args(args.train_args)
    scale = replace(read_scale(args.scale), train_args=args.train_args)
    if args.launch_args is not None:
        scale = replace(scale, launch=args.launch_args)
    chosen = Selection(scale, args.models, args.datasets, args.augment, args.methods, args.seeds)
    ledger = [] if args.plan else records.read(args.ledger)
    if args.choose:
        choice = choose(scale, chosen.trials(), ledger)
        show(args, "trials", scale, choice.runs, lambda _: choice.table)
        write_whole(scale.chosen_path, choice.file)
        print(f"chosen: {scale.chosen_path}")
    elif args.table:
        paper = scale.name == PAPER
        picture = partial(draw, title=f"Scale: {scale.name}", with_paper=paper)
        show(args, "reproduction", scale, rows_of(chosen, ledger), partial(in_words, chosen, ledger), picture)
    elif args.trade_off:
        seconds, tables = trade_off.seconds_of(args.benchmark), rows_of(chosen, ledger)
        modes = {setting: trade_off.modes_of(rows, seconds) for setting, rows in tables.items()}
        show(args, "trade-off", scale, modes, trade_off.markdown, trade_off.draw)
    elif args.plan:
        gpu = price.Gpu(args.gpu, args.peak_tflops * 1e12, args.utilisation)
        show(args, "plan", scale, [price.price(cell, scale) for cell in chosen.runs()], partial(price.table, gpu=gpu))
    else:
        run(chosen.trials() if args.tune else chosen.runs(), scale, args, sys.argv[1:] if argv is None else argv)


def in_words(chosen: Selection, ledger: Sequence[records.Record], tables: dict[Setting, list[Row]]) -> str:
    """Render the tables of a scale, and what stands beside them."""
    like = chosen.scale.like
    parts = [markdown(tables, with_paper=chosen.scale.name == PAPER), beside.combinations(tables)]
    if like is not None:
        parts.append(beside.of_scales(tables, rows_of(Selection(read_scale(like), seeds=chosen.seeds), ledger), like))
    return "\n\n".join(filter(None, parts))


def show(
    args: argparse.Namespace,
    what: str,
    scale: Scale,
    found: T,
    render: Callable[[T], str],
    draw: Callable[[T, Path], object] | None = None,
) -> None:
    """Print what was found, and put it, with its picture if it has one, between the marks of a page."""
    if not found:  # a page that has something shall keep it
        raise ValueError(f"{args.ledger} has no runs of these cells; run them first, or name their --ledger")
    mark, text = f"{what}-{scale.name}", render(found)
    page: Path = args.page or args.output_dir / f"{mark}.md"
    print(text, flush=True)
    write_part(page, mark, text, draw and partial(draw, found), f"{mark}.png", "The tables below as a picture")
    print(f"\npage: {page}" + (f"\npicture: {page.with_name(f'{mark}.png')}" if draw else ""))


def run(cells: list[Cell], scale: Scale, args: argparse.Namespace, argv: list[str]) -> None:
    """Run the cells here, or hand them to SLURM; or only list them."""
    sweep = Sweep(scale, args.ledger, args.output_dir, args.data_root, args.jobs, args.minutes)
    if args.task is not None:
        if not 0 <= args.task < len(cells):
            has = f"are 0 to {len(cells) - 1}" if cells else "are none"
            raise ValueError(f"--task {args.task}: the cells chosen here {has}")
        cells = [cells[args.task]]
    if not args.list:
        sweep.check()
    if not (args.list or args.slurm):
        sweep.run(cells)
        if sweep.elsewhere:
            print(f"{len(sweep.elsewhere)} cells were left to another sweep")
        if sweep.stopped:
            print(f"{len(sweep.stopped)} cells are left, as the time is over; the same command continues")
        if sweep.failures:
            sys.exit("\n".join(map(str, sweep.failures)))
        return
    todo = sweep.pending(cells)
    if args.list:
        print("\n".join(f"{'to do' if cell in todo else 'done '}  {cell}" for cell in cells))
    elif todo:
        tasks = [index for index, cell in enumerate(cells) if cell in todo]
        script = slurm.write_script(args.output_dir, tasks, slurm.task_argv(argv))
        print(f"{len(todo)} of {len(cells)} cells: {script}")
        print(slurm.submit(script, args.sbatch_args))
    else:
        print(f"all {len(cells)} cells are in {args.ledger}")


if __name__ == "__main__":
    run_script(main)
