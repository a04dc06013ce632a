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
from importlib.metadata import version
from pathlib import Path

import torch
from benchmarks import device

from amp_plugin.train.defaults import cpu_computes_in_bf16

try:
    from benchmarks import counts, host, pipeline, recipe, startup, step
    from benchmarks.rows import Row, draw, markdown
except ModuleNotFoundError as missing:
    if not device.asked_for(None):
        sys.exit(f'error: {missing.name} is missing: pip install "amp-plugin[benchmark]"')

SUBJECTS = ("counts", "step", "ascents", "host", "memory", "recipe", "pipeline", "startup")


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of the chosen subjects, as they are measured."""
    torch.set_num_threads(args.threads)
    cells = [(size, step.LADDER[size], batch_size) for size in args.sizes for batch_size in args.batch_sizes]
    if "counts" in args.only:
        yield from counts.measure()
    if "step" in args.only:
        yield from (step.times(*cell, args.seconds) for cell in cells)
    if "ascents" in args.only:
        yield from (step.times(*cell, args.seconds, modes=True) for cell in cells)
    if "host" in args.only:
        yield host.times(args.seconds)
    if "memory" in args.only:
        yield from (step.memory(*cell, args.threads) for cell in cells if cell[2] == step.MEMORY_BATCH_SIZE)
    if "recipe" in args.only:
        for size in filter(args.sizes.__contains__, recipe.SIZES):
            yield recipe.arithmetic(size, step.LADDER[size], args.seconds)
            yield from recipe.overhead(size, step.LADDER[size], args.threads, args.seconds, args.output_dir)
    if "pipeline" in args.only:
        yield from pipeline.measure()
    if "startup" in args.only:
        yield from startup.measure(args.output_dir)


def machine(threads: int) -> str:
    """Name the processor, threads and versions in one line."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((li.partition(":")[2].strip() for li in file if li.startswith("model name")), processor)
    capability = torch.backends.cpu.get_cpu_capability() + (", bf16" if cpu_computes_in_bf16() else ", no bf16")
    names = ("torch", "timm", "transformers", "accelerate", "torchvision", "pytorch_optimizer")
    versions = [f"{name} {version(name)}" for name in names]
    return f"{processor} ({capability}), {threads} threads; Python {platform.python_version()}, {', '.join(versions)}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="Subjects; default: all.")
    parser.add_argument(
        "--sizes", nargs="+", choices=step.LADDER, default=list(step.LADDER), help="Models of the steps and recipes."
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=list(step.BATCH_SIZES), help="Images a step.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Of the rounds of a model and batch size.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Of torch, for steps.")
    parser.add_argument("--output_dir", default="runs/benchmark", help="Folder of the results.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    if device.asked_for(argv):
        return device.main(argv)
    args = parse(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    where = machine(args.threads)
    rows: list[Row] = []
    with (folder / "benchmark.jsonl").open("w") as file:
        file.write(json.dumps({"machine": where}) + "\n")
        for some in measure(args):
            rows += some
            for row in some:
                file.write(json.dumps(asdict(row)) + "\n")
                print(f"{row.case}: {row.name} / {row.baseline}: {row.ratio:.3f}", flush=True)
            file.flush()
    text = f"{where}\n\n{markdown(rows)}\n"
    (folder / "benchmark.md").write_text(text)
    pictures = draw(rows, folder, where)
    print("\n".join([f"\n{text}", f"table: {folder / 'benchmark.md'}", *(f"picture: {path}" for path in pictures)]))


if __name__ == "__main__":
    main()
