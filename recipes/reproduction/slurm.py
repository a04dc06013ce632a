"""Cells as a SLURM job array: one task a cell."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=reproduce
#SBATCH --array={array}
#SBATCH --output={logs}/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Written by reproduce.py --slurm: {count} of its cells had not been run. A task that is started again continues.
cd {folder}
exec {command} --task "$SLURM_ARRAY_TASK_ID"
"""


def indices(numbers: Sequence[int]) -> str:
    """Sorted numbers as sbatch takes them: 0-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def write_script(folder: Path, tasks: Sequence[int], argv: Sequence[str]) -> Path:
    """The array's script, in the folder of the sweep.

    Args:
        folder: of the sweep; the tasks' logs go into ``slurm`` in it.
        tasks: indices of the cells to run.
        argv: of this program, without ``--slurm`` and what belongs to it.
    """
    logs = folder.resolve() / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "reproduce.sbatch"
    program = [sys.executable, str(Path(sys.argv[0]).resolve()), *argv]
    script.write_text(
        _SCRIPT.format(
            array=indices(tasks),
            logs=logs,
            count=len(tasks),
            folder=shlex.quote(str(Path.cwd())),
            command=shlex.join(program),
        )
    )
    return script


def submit(script: Path, sbatch_args: Sequence[str]) -> str:
    """Hand it to sbatch.

    Returns:
        What sbatch said.

    Raises:
        ValueError: there is no sbatch here, or it refused.
    """
    command = ["sbatch", *sbatch_args, str(script)]
    if shutil.which("sbatch") is None:
        raise ValueError(f"there is no sbatch here; on the cluster's login node: {shlex.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def task_argv(argv: Sequence[str]) -> list[str]:
    """The arguments of an array's task: those of the command that submits it, without its own two."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--sbatch_args":
            next(words)
        elif word != "--slurm" and not word.startswith("--sbatch_args="):
            kept.append(word)
    return kept
