"""How long it takes until something happens, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.turns import Ways, compare, repeat

TRAIN = Path(__file__).parents[1] / "train.py"
ROUNDS = 3


def measure(output_dir: str) -> Iterator[list[Row]]:
    """Compare each command with the import of the libraries that it cannot do without."""
    yield _against("import amp_plugin", ["-c", "import amp_plugin"], "import timm", ["-c", "import timm"])
    libraries = "timm, transformers.trainer, datasets, evaluate"
    step = ["--max_steps", "1", "--eval_strategy", "no", "--disable_tqdm", "true"]
    step += ["--output_dir", f"{output_dir}/first_step"]
    for name, options in {"train.py --help": ["--help"], "train.py, one step and the saved model": step}.items():
        yield _against(name, [str(TRAIN), *options], f"import of {libraries}", ["-c", f"import {libraries}"])


def _against(name: str, command: list[str], base: str, base_command: list[str]) -> list[Row]:
    ways: Ways = {name: (repeat(partial(_run, command)), base), base: (repeat(partial(_run, base_command)), None)}
    return compare("Start-up", "fresh process", ways, "s", rounds=(ROUNDS, ROUNDS))


def _run(arguments: list[str]) -> None:
    path = os.pathsep.join(filter(None, [str(TRAIN.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
