"""Means over the steps since the last log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Means:
    """Means of values that are added by name, each over the steps that added a value.

    Args:
        finite_only: whether tensors that are NaN or infinite are left out of their mean, as
            ``TrainingArguments.logging_nan_inf_filter`` asks; default False.
    """

    def __init__(self, *, finite_only: bool = False) -> None:
        self._finite_only = finite_only
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a number or a 0-d tensor, without a copy to or from the device."""
        count: Tensor | float = 1.0
        if isinstance(value, Tensor):
            value = value.detach().float()
            if self._finite_only:
                finite = value.abs() < math.inf  # which NaN is not either
                value, count = torch.where(finite, value, 0.0), finite.float()
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0.0) + count

    def taken(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all processes, but those of no value at all, and begin anew."""
        own = [*self._sums.values(), *self._counts.values()]
        stacked = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=accelerator.device) for x in own])
        sums, counts = accelerator.reduce(stacked, "sum").view(2, -1).tolist()
        means = {name: s / n for name, s, n in zip(self._sums, sums, counts, strict=True) if n}
        self._sums, self._counts = {}, {}
        return means
