"""Processes that take turns: each makes one step while the others wait, round after round.

So every figure and its baseline are measured within the same seconds, share nothing, and have a peak memory of their
own. It also lets a loop that cannot be interrupted, such as the Trainer's, be measured step by step.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

Turn = Callable[[], None]
# Called in a process of its own with `turn` and the arguments; calls turn() before each step, and never returns.
Loop = Callable[..., None]


@dataclass(frozen=True)
class Contestant:
    """A loop and what it is called with."""

    loop: Loop
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What one contestant took.

    Attributes:
        seconds: of each round.
        peak_memory: in bytes, of the process's resident set, over the rounds.
        peak_allocated: in bytes, of torch's allocator on the accelerator, over the rounds; 0 without one.
    """

    seconds: list[float]
    peak_memory: int
    peak_allocated: int


def take_turns(
    contestants: Mapping[str, Contestant],
    *,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    warm_up: int,
    threads: int,
) -> dict[str, Measured]:
    """Run rounds until the time is over, in each of which every contestant makes one step; the order rotates.

    Args:
        contestants: by name.
        seconds: of all measured rounds together, about.
        min_rounds: even if that takes longer.
        max_rounds: even if that takes less.
        warm_up: rounds before that count for nothing.
        threads: of torch in each process.

    Raises:
        RuntimeError: a contestant failed; the message has its traceback.
    """
    with _processes(contestants, threads) as connections:
        for name, connection in connections.items():
            _receive(name, connection)  # ready
        for i in range(warm_up):
            for name in _rotated(list(connections), i):
                _ask(name, connections[name], "step")
        for name, connection in connections.items():
            _ask(name, connection, "forget peak")
        times: dict[str, list[float]] = {name: [] for name in connections}
        start = time.perf_counter()
        for i in range(max_rounds):
            if i >= min_rounds and time.perf_counter() - start > seconds:
                break
            for name in _rotated(list(connections), i):
                times[name].append(_ask(name, connections[name], "step"))
        peaks = {name: _ask(name, connection, "peak") for name, connection in connections.items()}
    return {name: Measured(times[name], *peaks[name]) for name in times}


@contextmanager
def _processes(contestants: Mapping[str, Contestant], threads: int) -> Any:
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    try:
        for name, contestant in contestants.items():
            connections[name], theirs = context.Pipe()
            arguments = (theirs, threads, contestant.loop, dict(contestant.arguments))
            processes.append(context.Process(target=_child, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def _ask(name: str, connection: Connection, question: str) -> Any:
    connection.send(question)
    return _receive(name, connection)


def _receive(name: str, connection: Connection) -> Any:
    try:
        kind, answer = connection.recv()
    except EOFError:
        kind, answer = "error", "its process died"
    if kind == "error":
        raise RuntimeError(f"benchmark of {name!r} failed: {answer}")
    return answer


def _child(connection: Connection, threads: int, loop: Loop, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere  # an error has a way of its own
        try:
            loop(_Turns(connection), **arguments)
            raise RuntimeError("the loop ended")
        except BaseException:
            connection.send(("error", traceback.format_exc()))


class _Turns:
    """The function `turn` of one process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start: float | None = None

    def __call__(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self._connection.send(("seconds", None if self._start is None else now - self._start))
        while (question := self._connection.recv()) != "step":
            if question == "forget peak":
                _forget_peak()
                self._connection.send(("done", None))
            else:
                self._connection.send(("peak", _peak()))
        self._start = time.perf_counter()


def _forget_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def _peak() -> tuple[int, int]:
    allocated = torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else 0
    try:
        with open("/proc/self/status") as file:
            kilobytes = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except OSError:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * kilobytes, allocated
