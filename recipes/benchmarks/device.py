"""Measure AMP's steps on one CUDA device: SGD, AMP and SAM, eager and as CUDA graphs, beside what the device can do.

    python recipes/benchmark.py --device cuda --seconds 300
    python recipes/benchmark.py --device cuda --draw benchmark_device.png

Every part adds its rows to a file of JSON lines at once. A part whose rows are there, from the same machine and commit,
is not measured again, and one that needs more time than is left is left out: so the command can be cut off and called
again. The picture is drawn of such a file, on any machine with matplotlib. With `--device cpu`, a trial of the command,
rows hold ratios alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from amp_plugin.arguments import Parser, number, path
from amp_plugin.provenance import commit
from benchmarks import device_steps, device_times
from benchmarks.device_steps import MODES, NETWORKS, PRECISIONS, Problem
from benchmarks.device_times import Row

SUBJECTS = ("ceilings", "step", "recipe", "memory", "runs")
HERE = Path(__file__).resolve().parents[1]
ABSOLUTE = ("ms", "host_ms", "ms_a_run", "images_s", "tflops", "gb_s", "mib")
# Seconds that a part may need: compiling takes most of them.
NEEDED = {"ceilings": 10, "step": 12, "recipe": 45, "memory": 15, "runs": 10}
COMPILING = 30
RECIPES = {  # options of train.py, with precision and mode of the bare passes to compare with
    "train.py --fast": (["--fast"], "bf16", "captured, compiled"),
    "train.py --capture --bf16": (["--capture", "--bf16", "--channels_last"], "bf16", "captured"),
    "train.py": ([], "tf32", "captured"),
}


class Part(NamedTuple):
    """A measurement, which takes at most so many seconds."""

    name: str
    seconds: float
    rows: Callable[[], Iterable[Row]]


def asked_for(argv: list[str] | None) -> bool:
    """Return whether a command line of benchmark.py asks for this."""
    return any(argument.partition("=")[0] == "--device" for argument in (sys.argv[1:] if argv is None else argv))


def main(argv: list[str] | None = None) -> list[str]:
    """Measure the parts that are not there yet, as far as the time goes, or draw what is there.

    Return the parts that failed.
    """
    begun = time.monotonic()
    args = parse(argv)
    file: Path = args.rows
    if args.draw:
        draw(file, args.draw)
        return []
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device")
    if args.data_root is not None and not args.data_root.is_dir():
        raise ValueError(f"--data_root {args.data_root} is no folder")
    here = machine(device)
    done = {row["part"] for row in read(file, here) if "left_out" not in row and "failed" not in row}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.read_text(encoding="utf-8").endswith("\n"):  # the command was cut off
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n")
    say(file, device, {"machine": here})
    failed: list[str] = []
    warnings.filterwarnings("error", message=".* cannot be captured")  # else its rows would be those of another mode
    for part in parts(args, device):
        if part.name in done:
            continue
        left = args.seconds - (time.monotonic() - begun)
        if left < part.seconds:
            say(file, device, {"part": part.name, "left_out": f"{left:.0f} s are left, {part.seconds:.0f} are needed"})
            continue
        try:
            for row in part.rows():
                say(file, device, {"part": part.name, **row})
        except Exception as error:  # the other parts can still be measured
            traceback.print_exc()
            failed.append(part.name)
            say(file, device, {"part": part.name, "failed": f"{type(error).__name__}: {error}"[:500]})
        device_times.free()
    return failed


def draw(file: Path, picture: Path) -> None:
    """Draw the rows of a file."""
    from benchmarks import device_picture  # needs matplotlib

    rows = read(file)
    if not any(str(row.get("part")).startswith("step") and "ratio" in row for row in rows):
        raise ValueError(f"--rows {file} has no steps to draw; measure them first")
    try:
        device_picture.draw(rows, picture)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what benchmark.py --device writes: {error!r}") from error


def parts(args: argparse.Namespace, device: torch.device) -> Iterator[Part]:
    """Yield the measurements, the most wanted first."""
    flops = device_steps.flops_per_image(args.network)
    ceilings: dict[str, float] = {
        row["ceiling"]: row["tflops"]
        for row in read(args.rows, machine(device))
        if "tflops" in row and "ceiling" in row
    }

    def measured_ceilings() -> Iterator[Row]:
        for row in device_times.ceilings(device):
            ceilings[row["ceiling"]] = row.get("tflops", 0.0)
            yield row

    def steps(batch: int, precision: str, mode: str) -> Iterator[Row]:
        case = {"batch": batch, "precision": precision, "mode": mode}
        for row in device_times.compare(Problem(device, args.network, batch, precision, mode)):
            if "ms" in row:
                work = device_steps.passes_of(row["way"]) * batch * flops
                row |= {"images_s": 1e3 * batch / row["ms"], "tflops": work / row["ms"] / 1e9}
                if ceilings.get(precision):
                    row["of_ceiling"] = row["tflops"] / ceilings[precision]
            yield case | row

    def memory(batch: int, mode: str) -> Iterator[Row]:
        for row in device_times.peaks(device, args.network, batch, mode):
            yield {"batch": batch, "precision": "bf16", "mode": mode} | row

    if "ceilings" in args.only and device.type == "cuda":
        yield Part("ceilings", NEEDED["ceilings"], measured_ceilings)
    cells = list(product(args.batch_sizes, args.precisions, args.modes))
    first, later = cells[: len(args.modes)], cells[len(args.modes) :]
    for chosen in (first, later):
        for cell in chosen if "step" in args.only else ():
            seconds = NEEDED["step"] + COMPILING * MODES[cell[2]].compiled
            yield Part("step: batch {}, {}, {}".format(*cell), seconds, partial(steps, *cell))
        if chosen is first:
            for name in RECIPES if "recipe" in args.only else ():
                yield Part(f"recipe: {name}", NEEDED["recipe"], partial(recipe, name, args, device))
            for mode in ("eager", "captured") if "memory" in args.only and device.type == "cuda" else ():
                yield Part(f"memory: {mode}", NEEDED["memory"], partial(memory, args.batch_sizes[0], mode))
    for count in (2, 3) if "runs" in args.only and device.type == "cuda" else ():
        runs = partial(device_times.side_by_side, device, args.network, count)
        yield Part(f"runs: {count} at once", NEEDED["runs"], runs)


def recipe(name: str, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield the time of a step of train.py, with its Trainer, data and logs, against bare captured passes."""
    import transformers.trainer
    from transformers import TrainerCallback

    from amp_plugin.train import job

    options, precision, mode = RECIPES[name]
    times: list[float] = []
    every = max(1, args.recipe_steps // 8)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

    told = ["--optim", "amp", "--max_steps", str(args.recipe_steps), "--per_device_train_batch_size", "50"]
    told += ["--eval_strategy", "no", "--save_strategy", "no", "--logging_strategy", "steps", "--logging_steps", "50"]
    told += ["--disable_tqdm", "true", "--report_to", "none", "--output_dir", f"{args.rows.parent}/recipe"]
    told += ["--model_kwargs", json.dumps(NETWORKS[args.network])]
    told += ["--dataset", "cifar10", "--data_root", str(args.data_root)] if args.data_root else []
    told += ["--use_cpu", "true"] if device.type == "cpu" else []
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(Clock)
    try:
        job.main([*told, *options])
    finally:
        callbacks.remove(Clock)
    device_times.free()
    bare = device_times.time_of(device, device_steps.amp_step(Problem(device, args.network, 50, precision, mode)))
    ms = median(1e3 * (b - a) / every for a, b in pairwise(times[2:]))  # the first ones warm up
    baseline = f"bare passes, {precision}, {mode}"
    yield {"way": name, "batch": 50, "baseline": baseline, "ratio": ms / bare, "ms": ms, "images_s": 5e4 / ms}
    yield {"way": baseline, "batch": 50, "baseline": baseline, "ratio": 1.0, "ms": bare, "images_s": 5e4 / bare}


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, the versions and the commit that rows come from."""
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "timm", "transformers")}
    named = {"commit": commit(), **versions, "python": sys.version.split()[0]}
    if device.type != "cuda":
        return {"device": device.type, **named}
    return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **named}


def say(file: Path, device: torch.device, row: Row) -> None:
    """Print a row and add it to the file; absolute figures are for devices that nobody else uses."""
    kept = {name: value for name, value in row.items() if device.type == "cuda" or name not in ABSOLUTE}
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(kept) + "\n")
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in kept.items()), flush=True)


def read(file: Path, of: dict[str, Any] | None = None) -> list[Row]:
    """Return the rows of a file, or those of one machine; a line that was cut off counts for nothing."""
    rows: list[Row] = []
    where: Any = None
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        where = row.get("machine", where)
        if of is None or ("part" in row and where == of):
            rows.append(row)
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="Device of the steps.")
    parser.add_argument(
        "--seconds", type=number(float, "[0, 1000000000]"), default=300.0, help="Time of the whole command."
    )
    parser.add_argument("--rows", type=path, default=Path("runs/benchmark/device.jsonl"), help="File of the rows.")
    parser.add_argument("--draw", type=path, metavar="PICTURE", help="Draw the rows of the file, and measure nothing.")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="Subjects; default: all.")
    parser.add_argument("--network", choices=NETWORKS, default="11.2M", help="PreActResNet18 of this size.")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=number(int, "[1, 1000000]"), default=[50, 128, 512], help="Images of a step."
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "tf32"], help="Arithmetic.")
    modes = ["eager", "captured", "captured, compiled"]
    parser.add_argument("--modes", nargs="+", choices=MODES, default=modes, help="How a step is made.")
    parser.add_argument("--recipe_steps", type=number(int, "[8, inf)"), default=240, help="Steps of train.py.")
    parser.add_argument(
        "--data_root", type=path, help="Folder with CIFAR-10 for train.py; default: the bundled sample."
    )
    args: argparse.Namespace = parser.parse_args(argv)
    return args
