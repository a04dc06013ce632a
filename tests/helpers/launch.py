"""Starts the scripts beside the tests in processes of their own, as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys

from repository import HELPERS, ROOT


def start_torchrun(script: str, *arguments: object, options: list[str]) -> subprocess.Popen[bytes]:
    """One torchrun agent for a script of this folder; the package is found wherever the tests run from."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(HELPERS / script), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})


def run_processes(processes: int, script: str, *arguments: object) -> None:
    """Run a script in some number of processes on this machine.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    options = ["--standalone", "--nproc_per_node", str(processes)]
    agent = start_torchrun(script, *arguments, options=options)
    if agent.wait():
        raise subprocess.CalledProcessError(agent.returncode, agent.args)
