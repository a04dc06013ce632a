"""The methods that are compared, from methods.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: for the tables.
        options: of train.py, or "dropout" or "epochs_times" (see methods.yaml).
        tuned_as: the method whose chosen values it takes; None for its own.
    """

    label: str
    options: dict[str, Any]
    tuned_as: str | None = None

    @property
    def ascent(self) -> str | None:
        """AMP's ascent policy; None where the method is another."""
        return str(self.options.get("amp_ascent", "full")) if self.options["optim"] == "amp" else None


@cache
def methods() -> dict[str, Method]:
    """By name, in the order in which a sweep runs them."""
    data = yaml.safe_load(Path(__file__).with_name("methods.yaml").read_text())
    return {name: Method(**fields) for name, fields in data.items()}
