"""Loops that take turns in one process: each makes one step while the others wait, round after round.

So every figure and its baseline are measured within the same seconds, on the same memory where they share it, and a
loop that cannot be interrupted, such as the Trainer's, can be measured step by step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from greenlet import getcurrent, greenlet

Turn = Callable[[], None]
# Calls turn() before each step, and never returns.
Loop = Callable[[Turn], None]


def take_turns(
    loops: Mapping[str, Loop], *, seconds: float, min_rounds: int, max_rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Run rounds until the time is over, in each of which every loop makes one step; the order rotates.

    Args:
        loops: by name; each runs up to its first turn in this order, before any makes a step.
        seconds: of all measured rounds together, about.
        min_rounds: even if that takes longer.
        max_rounds: even if that takes less.
        warm_up: rounds before that count for nothing.

    Returns:
        The seconds of each round, by name.

    Raises:
        RuntimeError: a loop ended. What a loop raises comes through.
    """
    hub = getcurrent()
    running = {name: greenlet(loop, hub) for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    try:
        for name in names:
            _advance(name, running[name], hub.switch)
        start = time.perf_counter()
        for i in range(warm_up + max_rounds):
            if i == warm_up:
                start = time.perf_counter()
            if i >= warm_up + min_rounds and time.perf_counter() - start > seconds:
                break
            by = i % len(names)
            for name in (*names[by:], *names[:by]):
                elapsed = _advance(name, running[name])
                if i >= warm_up:
                    times[name].append(elapsed)
    finally:
        for loop in running.values():
            loop.throw()  # GreenletExit: the loop leaves its contexts
    return times


def _advance(name: str, loop: greenlet, *arguments: Turn) -> float:
    """To its next turn; the seconds that took."""
    start = time.perf_counter()
    loop.switch(*arguments)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elapsed = time.perf_counter() - start
    if loop.dead:
        raise RuntimeError(f"the loop {name!r} ended")
    return elapsed
