"""Cells as a SLURM job array: one task a cell."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
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
    """Render sorted numbers as sbatch takes them: 0-3,7."""
    spans = [[n for _, n in span] for _, span in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def write_script(folder: Path, tasks: Sequence[int], argv: Sequence[str]) -> Path:
    """Write the script of an array that runs the cells of these indices, into ``slurm`` in the sweep's folder."""
    logs = folder.resolve() / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "reproduce.sbatch"
    program = shlex.join([sys.executable, str(Path(sys.argv[0]).resolve()), *argv])
    array, here = indices(tasks), shlex.quote(str(Path.cwd()))
    script.write_text(
        _SCRIPT.format(array=array, logs=logs, count=len(tasks), folder=here, command=program), encoding="utf-8"
    )
    return script


def submit(script: Path, sbatch_args: Sequence[str]) -> str:
    """Hand a script to sbatch and return what sbatch said."""
    command = ["sbatch", *sbatch_args, str(script)]
    if shutil.which("sbatch") is None:
        raise ValueError(f"there is no sbatch here; on the cluster's login node: {shlex.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def task_argv(argv: Sequence[str]) -> list[str]:
    """Return the arguments of the array's tasks: those of the command that submits it, without its own two."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--slurm", action="store_true")
    own.add_argument("--sbatch_args")
    return own.parse_known_args(argv)[1]
