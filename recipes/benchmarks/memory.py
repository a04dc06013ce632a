"""The peak memory of a loop and its page faults, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from amp_plugin.train.defaults import keep_freed_memory
from benchmarks.turns import Loop

_WARM_UP = 2  # steps in which buffers and allocators grow
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """What the steps after the first ones took."""

    process: int  # resident set of the process, in bytes
    allocator: int  # memory of torch's allocator on the accelerator, in bytes; 0 without one
    faults: float  # pages that the system had to provide in a step


class _Over(BaseException):
    """Ends a loop that never returns."""


def peak_memory(loop: Loop, threads: int, steps: int = 2, *, keep_freed: bool = False) -> Peak:
    """Run the loop, which must be picklable, in a fresh process; measure `steps` steps after the first two."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, loop, threads, steps, keep_freed).result()


def _measure(loop: Loop, threads: int, steps: int, keep_freed: bool) -> Peak:
    torch.set_num_threads(threads)
    if keep_freed:
        keep_freed_memory()
    accelerated, turns, faults = torch.accelerator.is_available(), 0, 0

    def turn() -> None:
        nonlocal turns, faults
        if turns == _WARM_UP:
            if _CLEAR.exists():
                _CLEAR.write_text("5")  # the peak counts from here
            if accelerated:
                torch.accelerator.reset_peak_memory_stats()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if turns == _WARM_UP + steps:
            raise _Over
        turns += 1

    with suppress(_Over):
        loop(turn)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    kibibytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), usage.ru_maxrss)
    allocated = torch.accelerator.max_memory_allocated() if accelerated else 0
    return Peak(1024 * kibibytes, allocated, (usage.ru_minflt - faults) / steps)
