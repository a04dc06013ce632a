"""What the steps of device_steps.py take in time and memory on one device, and what the device can do at most."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.device_steps import WAYS, Problem, Step, amp_step

Row = dict[str, Any]
ROUNDS, GROUP_SECONDS = 5, 0.06


def group_size(device: torch.device, step: Step) -> int:
    """Return how many steps make a measurable time, after those that warm up and capture."""
    for _ in range(5):
        step()
    _wait(device)
    begun = time.perf_counter()
    step()
    _wait(device)
    return max(1, int(GROUP_SECONDS / max(time.perf_counter() - begun, 1e-5)))


def milliseconds(device: torch.device, step: Step, group: int) -> tuple[float, float]:
    """Return the milliseconds of a step in a group of steps, and those that the host takes to queue it."""
    _wait(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    if events:
        events[0].record()
    begun = time.perf_counter()
    for _ in range(group):
        step()
    host = 1e3 * (time.perf_counter() - begun) / group
    if not events:
        return host, host
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / group, host


def time_of(device: torch.device, step: Step) -> float:
    """Return the median milliseconds of a step."""
    group = group_size(device, step)
    return median(milliseconds(device, step, group)[0] for _ in range(ROUNDS))


def compare(problem: Problem) -> Iterator[Row]:
    """Yield the times of all ways on a problem, and their ratios to SGD's, from rounds in which they take turns."""
    steps: dict[str, Step] = {}
    groups: dict[str, int] = {}
    for way, make in WAYS.items():
        try:
            step = make(problem)
            groups[way], steps[way] = group_size(problem.device, step), step
        except (ImportError, ValueError) as reason:
            yield {"way": way, "left_out": str(reason)}
        except Exception as error:  # the other ways can still be measured
            traceback.print_exc()
            yield {"way": way, "failed": f"{type(error).__name__}: {error}"[:500]}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            times[way].append(milliseconds(problem.device, step, groups[way]))
    for way, measured in times.items():
        ratios = [ms / base for (ms, _), (base, _) in zip(measured, times["SGD"], strict=True)]
        low, ratio, high = quantiles(ratios, n=4)
        ms, host = (median(column) for column in zip(*measured, strict=True))
        yield {"way": way, "baseline": "SGD", "ratio": ratio, "low": low, "high": high, "ms": ms, "host_ms": host}


def side_by_side(device: torch.device, network: str, count: int) -> Iterator[Row]:
    """Yield the time of several captured AMP steps at once, each on a stream of its own, against one alone; on CUDA."""
    steps = [amp_step(Problem(device, network, 50, "bf16", "captured")) for _ in range(count)]
    streams = [torch.cuda.Stream() for _ in steps]

    def together() -> None:
        current = torch.cuda.current_stream()
        for step, stream in zip(steps, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            current.wait_stream(stream)

    alone, ms = time_of(device, steps[0]), time_of(device, together)
    yield {"runs": count, "baseline": "one run", "ratio": ms / count / alone, "ms": ms, "ms_a_run": ms / count}


def peaks(device: torch.device, network: str, batch: int, mode: str) -> Iterator[Row]:
    """Yield the peak memory of every way with all that lives between steps, and its ratio to SGD's."""
    found: dict[str, int] = {}
    for way in ("SGD", *WAYS):  # the first one makes the workspaces of the libraries, and is measured again
        free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            step = WAYS[way](Problem(device, network, batch, "bf16", mode))
        except (ImportError, ValueError):
            continue
        for _ in range(6):
            step()
        torch.cuda.synchronize()
        found[way] = torch.cuda.max_memory_allocated() - before
        del step
    for way, peak in found.items():
        yield {"way": way, "baseline": "SGD", "ratio": peak / found["SGD"], "mib": peak / 2**20}


def ceilings(device: torch.device) -> Iterator[Row]:
    """Yield what the device can do at most: a large product in each precision, and a copy."""
    for precision, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = True
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        yield {"ceiling": precision, "tflops": 2 * 8192**3 / time_of(device, partial(torch.mm, a, a)) / 1e9}
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield {"ceiling": "copy", "gb_s": 2 * 2**30 / time_of(device, lambda: target.copy_(source)) / 1e6}


def free() -> None:
    """Give back what the last measurement has used, compiled code and memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
