"""Reproduce the tables of the paper: run their cells, choose hyper-parameters, tabulate what has been run.

    python recipes/reproduce.py --scale cpu --data_root DATA --tune  # the trials, on held-out training images
    python recipes/reproduce.py --scale cpu --choose  # the best of them, into cpu_chosen.yaml
    python recipes/reproduce.py --scale cpu --data_root DATA  # the runs that are reported, on the test images
    python recipes/reproduce.py --scale paper --models preactresnet18 --methods erm amp --jobs 2

A cell is a model, an augmentation, a data set, a method and a seed. What a scale has in common stands in
recipes/reproduction/SCALE.yaml (or in a file of your own), what a method means in methods.yaml, what the paper
publishes in published.yaml. Cells run seed by seed, ERM and AMP first, so that what is done is of use at any time.

Each is a run of train.py under accelerate launch, in a folder of its own with its log. A cell whose run stands in the
ledger is not run again, and one that was killed continues from its last checkpoint: give the same command again.
Several sweeps may share a folder; a cell is run by one of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from reproduction import records
from reproduction.cells import Selection
from reproduction.choose import choose
from reproduction.scale import read_scale
from reproduction.sweep import Sweep


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to do; without any of these: run the cells").add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="Run the trials that choose hyper-parameters.")
    what.add_argument("--choose", action="store_true", help="Write the best trials' values to SCALE_chosen.yaml.")
    cells = parser.add_argument_group("which cells; default: all of the scale")
    cells.add_argument("--scale", default="cpu", metavar="SCALE", help="cpu, paper or a YAML file. [cpu]")
    cells.add_argument("--models", nargs="+", metavar="NAME", help="By the paper's names, e.g. preactresnet18 vgg16.")
    cells.add_argument("--datasets", nargs="+", metavar="NAME", help="cifar10, cifar100, svhn.")
    cells.add_argument("--augment", nargs="+", metavar="NAME", help="plain, cutout, autoaugment, none.")
    cells.add_argument("--methods", nargs="+", metavar="NAME", help="Default: the scale's, or those published.")
    cells.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Of the runs that are reported.")
    how = parser.add_argument_group("how to run them")
    how.add_argument("--data_root", metavar="DIR", help="Folder of the data sets; default: the Hub.")
    how.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="[%(default)s]")
    how.add_argument("--ledger", type=Path, metavar="FILE", help="JSON Lines. Default: ledger.jsonl in --output_dir.")
    how.add_argument("--list", action="store_true", help="Only list the cells, and which are done.")
    how.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="Cells at a time, on a GPU each if there are. [1]"
    )
    how.add_argument("--launch_args", metavar="TEXT", help="For accelerate launch, instead of the scale's.")
    how.add_argument("--train_args", default="", metavar="TEXT", help='More options of train.py, e.g. "--bf16 true".')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be positive, got {args.jobs}")
    args.ledger = args.ledger or args.output_dir / "ledger.jsonl"
    return args


def main(argv: list[str] | None = None) -> None:
    """Do what is asked for."""
    args = parse(argv)
    scale = replace(read_scale(args.scale), train_args=shlex.split(args.train_args))
    if args.launch_args is not None:
        scale = replace(scale, launch=shlex.split(args.launch_args))
    chosen = Selection(scale, args.models, args.datasets, args.augment, args.methods, args.seeds)
    if args.choose:
        print(choose(scale, chosen.trials(), records.read(args.ledger)))
        print(f"chosen: {scale.chosen_path}")
        return
    cells = chosen.trials() if args.tune else chosen.runs()
    sweep = Sweep(scale, args.ledger, args.output_dir, args.data_root, args.jobs)
    if args.list:
        todo = sweep.pending(cells)
        print("\n".join(f"{'to do' if cell in todo else 'done '}  {cell}" for cell in cells))
        return
    sweep.run(cells)
    if sweep.failures:
        sys.exit("\n".join(map(str, sweep.failures)))
    if sweep.elsewhere:
        print(f"{len(sweep.elsewhere)} cells were left to another sweep")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
