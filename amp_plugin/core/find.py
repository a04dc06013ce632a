"""The AMP optimizer inside what a host has wrapped around it."""

from __future__ import annotations

from typing import Any

from amp_plugin.core.optimizer import AMP


def find_amp(optimizer: Any) -> AMP | None:
    """Return the AMP optimizer in what accelerate, Lightning or timm's Lookahead wrapped around it, or None."""
    # Lightning's wrapper calls itself AMP too, with attributes of its own.
    while optimizer is not None and (not isinstance(optimizer, AMP) or hasattr(optimizer, "optimizer")):
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_base_optimizer", None)
    return optimizer
