"""Means over the steps since the last log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Means:
    """Means of values that are added by name, each over the steps that added a value."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a number or a 0-d tensor, without a copy to or from the device."""
        value = value.detach().float() if isinstance(value, Tensor) else value
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def taken(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all processes, and begin anew."""
        device = accelerator.device
        own = [torch.as_tensor(total, dtype=torch.float32, device=device) for total in self._sums.values()]
        sums = accelerator.reduce(torch.stack(own), "mean").tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means
