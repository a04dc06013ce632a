"""The main job, recipes/train.py, as a test starts it: in a process of its own, on a tiny network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import Finished, run_scripts
from repository import ROOT

SCRIPT = ROOT / "recipes" / "train.py"
RECIPES = sorted(path for path in SCRIPT.parent.glob("*.yaml") if not path.stem.startswith("finetune_"))
QUICK = [
    *("--train_images", "60", "--per_device_train_batch_size", "20", "--num_train_epochs", "2"),
    *("--model_kwargs", '{"width": 4, "layers": [1, 1, 1, 1]}', "--use_cpu", "true", "--cpu_threads", "1"),
]
_VARIABLES = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


PICTURES = ("matplotlib.figure",)  # without it the main job draws none, which takes longer than its training


def train(folder: Path, *arguments: str, pictures: bool = False) -> Finished:
    """Run the main job in a folder."""
    (finished,) = run_scripts(SCRIPT, list(arguments), folder, [_VARIABLES], () if pictures else PICTURES)
    return finished


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as a user does: with an interpreter that imports everything."""
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **_VARIABLES},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launcher(name: str) -> list[str]:
    """The console script beside this interpreter."""
    return [str(Path(sys.executable).parent / name)]


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())
