"""The weights that every host ends with, against the float64 reference; EXACTNESS.md is the table of it."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import timm
import torch
import transformers
from exactness_problem import (
    AUTOCAST,
    BALL,
    COMPILE,
    HOSTS,
    MICRO_BATCHES,
    PROCESSES,
    SGD,
    STEPS,
    Cell,
    Net,
    Result,
    batches_of,
    cells_of,
)
from launch import run_processes
from reference import Tensors, l2
from repository import RECORDS
from torch.nn import functional as F
from windows import window_trajectory

TABLE = RECORDS / "EXACTNESS.md"
WRITE = "AMP_PLUGIN_WRITE_EXACTNESS"
TOLERANCE = {"no": 1e-6, "bf16": 2e-2, "fp16": 2e-2}
PRECISION = {"no": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast, scaler"}
REFUSED = {("closure", "fp16"): "a gradient scaler cannot drive step(closure)"}
_HEAD = """# How exact every host is

Made by `tests/core/test_exactness.py`; do not edit. The weights of a small convolutional net with BatchNorm
after {steps} steps in each host, against `tests/helpers/windows.py`, a float64 reference that shares no code with the
package.

- fp32: the largest ||w - w_ref|| / ||w_ref|| of a tensor.
- bf16, fp16: ||w - w_ref|| / ||w_ref - w_0|| over all weights, the error in parts of the way they went.
- Two processes are DDP over gloo. All ran on the CPU, where accelerate has no fp16: there the test gives it autocast
  and a `GradScaler`, as it has them on a GPU.
- With several micro-batches in a step, window: one perturbation for all of them; each: one for each micro-batch. Either
  is compared with the reference that does the same.

{versions}, Python {python}. Made by

    {write}=1 python -m pytest tests/core/test_exactness.py -m ""
"""
Runs = Callable[[str], dict[Cell, list[Result]]]


@functools.cache
def reference(micro_batches: int, processes: int, accumulation: str) -> Tensors:
    """The weights after the last step, with a perturbation for the "window" or one for "each" micro-batch."""
    steps = []
    for step in batches_of(Cell("", "no", micro_batches, processes, "no")):
        steps.append([[batch for batches in step for batch in batches]] if accumulation == "window" else step)
    return window_trajectory(Net(), F.cross_entropy, steps, **BALL, **SGD)[-1]


def reference_of(cell: Cell) -> Tensors:
    return reference(cell.micro_batches, cell.processes, HOSTS[cell.host])


def difference(weights: Tensors, want: Tensors, precision: str) -> float:
    """fp32: the largest ||w - want|| / ||want|| of a tensor. Else ||w - want|| over all, in parts of the update."""
    apart = {name: weights[name].double() - want[name] for name in want}
    if precision == "no":
        return max(l2([apart[name]]) / l2([want[name]]) for name in want)
    start = {name: p.detach().double() for name, p in Net().named_parameters()}
    return l2(apart.values()) / l2(want[name] - start[name] for name in want)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All trainings with one way of compiling, made by two processes when first asked for; by cell, of each process."""

    @functools.cache
    def make(compiler: str) -> dict[Cell, list[Result]]:
        folder = tmp_path_factory.mktemp("exactness")
        run_processes(2, "exactness_cells.py", folder, compiler)
        results: dict[Cell, list[Result]] = {}
        for rank in range(2):
            for cell, result in torch.load(folder / f"{compiler} {rank}.pt", weights_only=True).items():
                results.setdefault(Cell(*cell), []).append(Result(*result))
        return results

    return make


@pytest.fixture(scope="session")
def entries() -> Iterator[dict[Cell, str]]:
    """What the tests found, by cell; becomes the table if the environment asks for it."""
    found: dict[Cell, str] = {}
    yield found
    if os.environ.get(WRITE):
        assert set(found) == {cell for compiler in COMPILE for cell in cells_of(compiler)}, 'run all, with -m ""'
        TABLE.write_text(render(found))


def parameters(compiler: str) -> list[Any]:
    marks = [pytest.mark.slow] if compiler == "inductor" else []
    return [pytest.param(cell, marks=marks, id=str(tuple(cell))) for cell in cells_of(compiler)]


@pytest.mark.parametrize("cell", [p for compiler in COMPILE for p in parameters(compiler)])
def test_every_host_ends_with_the_references_weights(cell: Cell, runs: Runs, entries: dict[Cell, str]) -> None:
    results = runs(cell.compile)[cell]
    assert len(results) == cell.processes
    weights, graphs, refusal = results[0]
    if (cell.host, cell.precision) in REFUSED:
        assert refusal.startswith(REFUSED[cell.host, cell.precision])
        entries[cell] = f"refused: {REFUSED[cell.host, cell.precision]}"
        return
    assert not refusal
    assert (graphs > 0) == (cell.compile != "no"), "compiled if it should be"
    for replica in results[1:]:
        assert all(torch.equal(replica.weights[name], w) for name, w in weights.items())
    distance = difference(weights, reference_of(cell), cell.precision)
    entries[cell] = f"{distance:.1e}"
    if not cell.perturbed:
        for measure in AUTOCAST:
            assert difference(weights, reference_of(cell), measure) > 10 * TOLERANCE[measure], (
                "AMP acts in this problem"
            )
        return
    assert distance < TOLERANCE[cell.precision]
    if cell.precision != "no":
        assert distance > 1e-4, "rounding must show, or the passes were not in 16 bits"


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_two_ways_to_accumulate_are_told_apart(processes: int) -> None:
    window, each = (reference(3, processes, accumulation) for accumulation in ("window", "each"))
    for precision in AUTOCAST:
        assert difference(each, window, precision) > 10 * TOLERANCE[precision]


def render(found: dict[Cell, str]) -> str:
    """EXACTNESS.md."""
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, timm, transformers, accelerate))
    lines = [_HEAD.format(steps=STEPS, versions=versions, python=platform.python_version(), write=WRITE)]
    columns = [(n, k) for n in PROCESSES for k in MICRO_BATCHES]
    for compiler in COMPILE:
        title = "Eager" if compiler == "no" else f"Compiled, {compiler}"
        heads = [f"{n} process{'es' * (n > 1)}, {k} micro-batch{'es' * (k > 1)}" for n, k in columns]
        lines += [
            f"## {title}",
            "",
            table_row("host", "accumulation", "precision", *heads, "tolerance"),
            table_row(*["---"] * 8),
        ]
        for host in HOSTS:
            for precision in AUTOCAST:
                cells = [found.get(Cell(host, precision, k, n, compiler), "not run") for n, k in columns]
                tolerance = f"{TOLERANCE[precision]:.0e}"
                lines.append(table_row(host, HOSTS[host], PRECISION[precision], *cells, tolerance))
        without = [found.get(Cell("attach", "no", k, n, compiler, perturbed=False), "not run") for n, k in columns]
        lines += [
            table_row("attach, not perturbed", "each", PRECISION["no"], *without, "none: it is what AMP does"),
            "",
        ]
    return "\n".join(lines)


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def test_the_table_has_every_cell() -> None:
    table = TABLE.read_text()
    rows = [line.split(" | ")[:3] for line in table.splitlines() if line.startswith("| ")]
    expected = [line.split(" | ")[:3] for line in render({}).splitlines() if line.startswith("| ")]
    assert rows == expected
    assert "not run" not in table
