"""Measure what AMP costs on this machine: every figure as a ratio to a baseline of the same run.

    python recipes/benchmark.py                            # everything
    python recipes/benchmark.py --only step --sizes 0.3M 11.2M --batch_sizes 50
    python recipes/benchmark.py --device cuda --help       # steps on a GPU, with absolute times

The script prints a table and leaves it in the output folder as benchmark.md, as a picture of each subject in
benchmark-SUBJECT.png and row by row in benchmark.jsonl. Steps are made in turns, one of each contestant a round, and
the quartiles of the rounds' ratios are given with the median. Keep the machine otherwise idle. The script needs
`pip install "amp-plugin[benchmark]"`.
"""

from __future__ import annotations

import os

# Before torch starts its threads, as train.py does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from benchmarks import device

from amp_plugin.arguments import Parser, different, number, path
from amp_plugin.command import run_command
from amp_plugin.train.defaults import cpu_computes_in_bf16
from amp_plugin.train.results import Steps
from amp_plugin.trainer.checkpoints import check_writable

try:
    from benchmarks import counts, host, pipeline, recipe, startup, step
    from benchmarks.rows import Row, draw, markdown
except ModuleNotFoundError as missing:
    if not device.asked_for(None):
        sys.exit(f'error: {missing.name} is missing: pip install "amp-plugin[benchmark]"')

SUBJECTS = ("counts", "step", "ascents", "host", "memory", "recipe", "pipeline", "startup")


def measure(subject: str, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of a subject, as they are measured."""
    torch.set_num_threads(args.threads)
    cells = [(size, step.LADDER[size], batch_size) for size in args.sizes for batch_size in args.batch_sizes]
    if subject == "counts":
        yield from counts.measure()
    if subject == "step":
        yield from (step.times(*cell, args.seconds) for cell in cells)
    if subject == "ascents":
        yield from (step.times(*cell, args.seconds, modes=True) for cell in cells)
    if subject == "host":
        yield host.times(args.seconds)
    if subject == "memory":
        yield from (step.memory(*cell, args.threads) for cell in cells if cell[2] == step.MEMORY_BATCH_SIZE)
    if subject == "recipe":
        for size in filter(args.sizes.__contains__, recipe.SIZES):
            yield recipe.arithmetic(size, step.LADDER[size], args.seconds)
            yield from recipe.overhead(size, step.LADDER[size], args.threads, args.seconds, str(args.output_dir))
    if subject == "pipeline":
        yield from pipeline.measure()
    if subject == "startup":
        yield from startup.measure(str(args.output_dir))


def machine(threads: int) -> str:
    """Name the processor, threads and versions in one line."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next((li.partition(":")[2].strip() for li in file if li.startswith("model name")), processor)
    capability = torch.backends.cpu.get_cpu_capability() + (", bf16" if cpu_computes_in_bf16() else ", no bf16")
    names = ("torch", "timm", "transformers", "accelerate", "torchvision", "pytorch_optimizer")
    versions = [f"{name} {version(name)}" for name in names]
    return f"{processor} ({capability}), {threads} threads; Python {platform.python_version()}, {', '.join(versions)}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser, count = Parser(description=__doc__), number(int, "[1, 1000000]")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="Subjects; default: all.")
    parser.add_argument(
        "--sizes", nargs="+", choices=step.LADDER, default=list(step.LADDER), help="Models of the steps and recipes."
    )
    parser.add_argument("--batch_sizes", nargs="+", type=count, default=list(step.BATCH_SIZES), help="Images a step.")
    seconds = number(float, "[0, 1000000000]")
    parser.add_argument("--seconds", type=seconds, default=60.0, help="Of the rounds of a model and batch size.")
    threads = number(int, "[1, 4096]")
    parser.add_argument("--threads", type=threads, default=torch.get_num_threads(), help="Of torch, for steps.")
    parser.add_argument("--output_dir", type=path, default=Path("runs/benchmark"), help="Folder of the results.")
    args: argparse.Namespace = parser.parse_args(argv)
    for option in ("only", "sizes", "batch_sizes"):
        different(getattr(args, option), f"--{option}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write; a subject that fails leaves the others and their results."""
    if device.asked_for(argv):
        if failed := device.main(argv):
            raise ValueError(f"failed: {'; '.join(failed)}; the other parts are measured")
        return
    args = parse(argv)
    folder: Path = args.output_dir
    check_writable(folder)
    where, rows, steps = machine(args.threads), list[Row](), Steps()

    def measure_subject(subject: str) -> None:
        for some in measure(subject, args):
            with (folder / "benchmark.jsonl").open(
                "a" if rows else "w", encoding="utf-8"
            ) as file:  # earlier rows stay until there are new
                lines = [{"machine": where}] * (not rows) + [asdict(row) for row in some]
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            rows.extend(some)
            for row in some:
                print(f"{row.case}: {row.name} / {row.baseline}: {row.ratio:.3f}", flush=True)

    try:
        for subject in SUBJECTS:
            if subject in args.only:
                steps.do(f"the subject {subject}", partial(measure_subject, subject))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {folder / 'benchmark.jsonl'}" if rows else "") from None
    if rows:
        text, table = f"{where}\n\n{markdown(rows)}\n", folder / "benchmark.md"
        print(f"\n{text}\ntable: {table}", flush=True)
        steps.do(table, lambda: table.write_text(text, encoding="utf-8"))
        steps.do("the pictures", lambda: print(*(f"picture: {path}" for path in draw(rows, folder, where)), sep="\n"))
    steps.end(folder, "the other results")


if __name__ == "__main__":
    run_command(main, (ValueError,))
