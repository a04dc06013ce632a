"""Loops that take turns in one process: each makes one step while the others wait, round after round.

A figure and its baseline are so measured within the same seconds, on the same memory where the loops share it. A loop
that cannot be interrupted, such as the Trainer's, can be measured step by step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from benchmarks.rows import Row, timed

Turn = Callable[[], None]
# A loop calls turn() before each step and never returns.
Loop = Callable[[Turn], None]
Ways = Mapping[str, tuple[Callable[..., None], str | None]]  # loops with the names of what they are compared with


def repeat(action: Callable[[], object]) -> Loop:
    """Return a loop whose step is one call of `action`."""

    def loop(turn: Turn) -> None:
        while True:
            turn()
            action()

    return loop


def take_turns(
    loops: Mapping[str, Loop],
    rounds: tuple[int, int],
    seconds: float = 0.0,
    warm_up: int = 1,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Run rounds in which every loop makes one step, in an order that rotates; return each loop's seconds by round.

    Each loop runs up to its first turn before any loop makes a step, and `warm_up` rounds go unmeasured. `rounds` are
    the least and the largest number of measured rounds, of which only the least is made once `seconds` are over.
    `prepare` is called before each step and not timed. What a loop raises comes through; a loop that ends is an error.
    """
    hub = getcurrent()
    running = {name: greenlet(loop, hub) for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    try:
        for name in names:
            _advance(name, running[name], hub.switch)
        start = time.perf_counter()
        for i in range(warm_up + rounds[1]):
            if i == warm_up:
                start = time.perf_counter()
            if i >= warm_up + rounds[0] and time.perf_counter() - start > seconds:
                break
            by = i % len(names)
            for name in (*names[by:], *names[:by]):
                prepare()
                elapsed = _advance(name, running[name])
                if i >= warm_up:
                    times[name].append(elapsed)
    finally:
        for loop in running.values():
            loop.throw()  # GreenletExit: the loop leaves its contexts
    return times


def compare(section: str, case: str, ways: Ways, unit: str, amount: float = 1.0, **settings: Any) -> list[Row]:
    """Let loops take turns, with the settings of `take_turns`, and return a row for each that has a baseline.

    The units "µs", "ms" and "s" are of durations, others of rates; `amount` is what a step of a loop does, e.g. its
    images.
    """
    scale = {"µs": 1e6, "ms": 1e3, "s": 1.0}.get(unit)
    times = take_turns({name: loop for name, (loop, _) in ways.items()}, **settings)
    figures = {n: [scale * t / amount if scale else amount / t for t in some] for n, some in times.items()}
    return [timed(section, case, n, base, figures[n], figures[base], unit) for n, (_, base) in ways.items() if base]


def _advance(name: str, loop: greenlet, *arguments: Turn) -> float:
    """Run a loop to its next turn and return the seconds that it took."""
    start = time.perf_counter()
    loop.switch(*arguments)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elapsed = time.perf_counter() - start
    if loop.dead:
        raise RuntimeError(f"the loop {name!r} ended")
    return elapsed
