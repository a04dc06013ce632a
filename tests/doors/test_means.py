"""Means of the log, which cost a step one kernel."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.counting import CountCalls
from torch import Tensor

from amp_plugin.doors.means import Means

STEPS = 150
ALONE: Any = SimpleNamespace(device=torch.device("cpu"), reduce=lambda values, how: values)


def steps() -> list[dict[str, Tensor | float]]:
    """Numbers and tensors of several types, in some steps of which one is absent, NaN or infinite."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for i in range(STEPS):
        a, b = torch.rand(2, generator=generator).unbind()
        values: dict[str, Tensor | float] = {"passes": 2.0, "a": a.double(), "b": b}
        if i % 3 == 0:
            del values["b"]
        if i % 10 == 1:
            values["a"] = torch.tensor((math.nan, math.inf)[i % 20 == 1])
        made.append(values)
    return made


@pytest.mark.parametrize("finite_only", [True, False])
def test_means_are_over_the_steps_that_added_a_value(finite_only: bool) -> None:
    means = Means(finite_only=finite_only)
    for _ in range(2):
        expected: dict[str, list[float]] = {}
        assert not means
        for values in steps():
            overwritten = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
            means.add(overwritten)
            for name, value in values.items():
                if math.isfinite(value) or not finite_only:
                    expected.setdefault(name, []).append(float(value))
                held = overwritten[name]
                if isinstance(held, Tensor):
                    held.fill_(7.0)  # as the replay of a graph does
        assert means
        taken = means.taken(ALONE)
        assert taken == pytest.approx({n: sum(v) / len(v) for n, v in expected.items()}, rel=1e-5, nan_ok=True)


def test_a_step_costs_one_kernel() -> None:
    means = Means(finite_only=True)
    values: dict[str, Tensor | float] = {name: torch.ones(()) for name in "abcde"} | {"passes": 2.0}
    with CountCalls() as count:
        for _ in range(STEPS):
            means.add(values)
    assert STEPS <= count.kernels < 1.5 * STEPS
    assert not count.syncs
