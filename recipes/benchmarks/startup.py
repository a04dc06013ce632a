"""How long it takes until something happens, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Row, timed

TRAIN = str(Path(__file__).parents[1] / "train.py")
ROUNDS = 3


def measure(output_dir: str) -> Iterator[list[Row]]:
    """Each against the import of the libraries that it cannot do without."""
    first_step = [
        TRAIN,
        "--max_steps",
        "1",
        "--eval_strategy",
        "no",
        "--output_dir",
        f"{output_dir}/first_step",
        "--disable_tqdm",
        "true",
    ]
    yield [_against("import amp_plugin", ["-c", "import amp_plugin"], "import timm", ["-c", "import timm"])]
    hosts = ["-c", "import timm, transformers.trainer, datasets, evaluate"]
    imports = "import of timm, transformers.trainer, datasets, evaluate"
    yield [_against("train.py --help", [TRAIN, "--help"], imports, hosts)]
    yield [_against("train.py, one step and the saved model", first_step, imports, hosts)]


def _against(name: str, command: list[str], baseline: str, baseline_command: list[str]) -> Row:
    pairs = [(_seconds(command), _seconds(baseline_command)) for _ in range(ROUNDS + 1)][1:]
    times, base = ([pair[i] for pair in pairs] for i in (0, 1))
    return timed("Start-up", "fresh process", name, baseline, times, base, "s")


def _seconds(arguments: list[str]) -> float:
    path = os.pathsep.join(filter(None, [str(Path(TRAIN).parents[1]), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - start
