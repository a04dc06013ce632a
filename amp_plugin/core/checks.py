"""Checks of hyper-parameters."""

from __future__ import annotations

import math

from torch import Tensor


def check_not_negative(**values: float | Tensor | None) -> None:
    """Raise ValueError, naming argument and value, unless each is None or a finite number >= 0."""
    for name, value in values.items():
        try:
            valid = value is None or 0.0 <= float(value) < math.inf
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_count(**values: int) -> None:
    """Raise ValueError, naming argument and value, unless each is an integer >= 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
