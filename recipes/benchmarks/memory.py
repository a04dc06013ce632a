"""The peak memory of a loop and its page faults, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from amp_plugin.train.defaults import keep_freed_memory
from benchmarks.turns import Loop, take_turns

_WARM_UP = 2  # steps in which buffers and allocators grow
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """What the steps after the first ones took."""

    process: int  # resident set of the process, in bytes
    allocator: int  # memory of torch's allocator on the accelerator, in bytes; 0 without one
    faults: float  # pages that the system had to provide in a step


def peak_memory(loop: Loop, threads: int, steps: int = 2, *, keep_freed: bool = False) -> Peak:
    """Run the loop, which must be picklable, in a fresh process; measure `steps` steps after the first two."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, loop, threads, steps, keep_freed).result()


def _measure(loop: Loop, threads: int, steps: int, keep_freed: bool) -> Peak:
    torch.set_num_threads(threads)
    if keep_freed:
        keep_freed_memory()
    accelerated, steps_begun, faults = torch.accelerator.is_available(), count(), 0

    def prepare() -> None:
        nonlocal faults
        if next(steps_begun) == _WARM_UP:
            if _CLEAR.exists():
                _CLEAR.write_text("5", encoding="utf-8")  # the peak counts from here
            if accelerated:
                torch.accelerator.reset_peak_memory_stats()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    take_turns({"": loop}, (steps, steps), warm_up=_WARM_UP, prepare=prepare)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
    kibibytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), usage.ru_maxrss)
    allocated = torch.accelerator.max_memory_allocated() if accelerated else 0
    return Peak(1024 * kibibytes, allocated, (usage.ru_minflt - faults) / steps)
