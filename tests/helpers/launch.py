"""Starts the scripts beside the tests, and the main job, in processes of their own.

Importing torch, timm and transformers takes far longer than most of what such a process is started for. A server that
has imported them forks one for each script; the package itself is imported afresh. Where no such server can be, a
process imports everything for itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from repository import HELPERS, ROOT
from torch.distributed import TCPStore

# What these start when they are imported has to survive a fork: a thread does not, unless (pyarrow) it knows of forks.
IMPORTED = ["torch", "torchvision", "timm", "transformers.trainer", "transformers.modeling_outputs", "accelerate"]
IMPORTED += ["torch._dynamo", "torch.distributed.fsdp", "datasets", "evaluate", "matplotlib.figure", "sklearn.metrics"]
_AT_FIRST = dict(os.environ)  # no test has changed a variable yet


class Finished(NamedTuple):
    """What a process that has ended leaves behind."""

    returncode: int
    stdout: str
    stderr: str


def forking() -> Any:
    """The context of `multiprocessing` that starts processes from the server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, _AT_FIRST, clear=True):  # which the server keeps
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    return context


def _become(
    script: str,
    arguments: list[str],
    folder: Path,
    variables: dict[str, str],
    missing: tuple[str, ...],
    printed: list[Path],
) -> None:
    gc.freeze()  # what was imported is no garbage
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, path in enumerate(printed, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_scripts(
    script: Path,
    arguments: list[str],
    folder: Path,
    variables: list[Mapping[str, str]],
    missing: tuple[str, ...] = (),
) -> list[Finished]:
    """Run a script in several processes at once; the first one that fails ends the others.

    Args:
        script: a file of Python.
        arguments: the words after its name on a command line.
        folder: the working directory.
        variables: for each process the environment variables that are added to those of this process.
        missing: modules that cannot be imported. Default: none.
    """
    context = forking()
    with tempfile.TemporaryDirectory() as kept:
        logs = [[Path(kept, f"{i}.{name}") for name in ("out", "err")] for i in range(len(variables))]
        processes = [
            context.Process(target=_become, args=(str(script), arguments, folder, {**os.environ, **own}, missing, log))
            for own, log in zip(variables, logs, strict=True)
        ]
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in connection.wait(list(running)):
                ended = running.pop(sentinel)  # type: ignore[index]
                ended.join()
                if ended.exitcode:
                    for other in running.values():
                        other.terminate()
        return [
            Finished(process.exitcode, *(path.read_text() if path.exists() else "" for path in log))
            for process, log in zip(processes, logs, strict=True)
        ]


def run_processes(
    processes: int,
    script: str,
    *arguments: object,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a script of this folder in some number of processes on this machine, as torchrun does.

    Args:
        processes: how many; with one there is no process group.
        script: the name of the file.
        arguments: the words after the name on a command line.
        folder: the working directory. Default: that of this process.
        variables: environment variables that are added to those of this process.

    Raises:
        subprocess.CalledProcessError: it failed; what all processes wrote to standard error is told.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free
    common = {
        **(variables or {}),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    of_ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    of_ranks = of_ranks if processes > 1 else [variables or {}]
    done = run_scripts(HELPERS / script, list(map(str, arguments)), folder or Path.cwd(), of_ranks)
    for finished in done:
        sys.stderr.write(finished.stderr)
    if code := next((finished.returncode for finished in done if finished.returncode), 0):
        raise subprocess.CalledProcessError(code, script)


def start_torchrun(script: str, *arguments: object, options: list[str]) -> subprocess.Popen[bytes]:
    """One torchrun agent for a script of this folder; the package is found wherever the tests run from."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(HELPERS / script), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
