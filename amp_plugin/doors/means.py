"""Means over the steps since the last log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MOST_STEPS = 64  # that wait to be added up


class Means:
    """Means of values that are added by name, each over the steps that added a value.

    The tensors of a step are put aside by one kernel, and added up many steps at a time.

    Args:
        finite_only: whether tensors that are NaN or infinite are left out of their mean, as
            ``TrainingArguments.logging_nan_inf_filter`` asks; default False.
    """

    def __init__(self, *, finite_only: bool = False) -> None:
        self._finite_only = finite_only
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._names: list[str] = []  # of the values in each of the waiting tensors
        self._waiting: list[Tensor] = []  # one for each step

    def __bool__(self) -> bool:
        return bool(self._sums or self._waiting)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add numbers and 0-d tensors of one step, without a copy to or from the host."""
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0.0) + 1.0
        if not tensors:
            return
        if self._names != list(tensors) or len(self._waiting) == _MOST_STEPS:
            self._add_up()
            self._names = list(tensors)
        device = next(iter(tensors.values())).device
        step = torch.stack([value.to(device, torch.float32) for value in tensors.values()])  # a copy: graphs overwrite
        self._waiting.append(step.detach())

    def taken(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all processes, but those of no value at all, and begin anew."""
        self._add_up()
        own = [*self._sums.values(), *self._counts.values()]
        stacked = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=accelerator.device) for x in own])
        sums, counts = accelerator.reduce(stacked, "sum").view(2, -1).tolist()
        means = {name: s / n for name, s, n in zip(self._sums, sums, counts, strict=True) if n}
        self._sums, self._counts = {}, {}
        return means

    def _add_up(self) -> None:
        if not self._waiting:
            return
        steps = torch.stack(self._waiting)
        there = steps.isfinite() if self._finite_only else torch.ones_like(steps, dtype=torch.bool)
        sums, counts = torch.where(there, steps, 0.0).sum(0), there.float().sum(0)
        for name, value, count in zip(self._names, sums, counts, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0.0) + count
        self._waiting = []
