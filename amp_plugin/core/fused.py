"""Steps of a base optimizer that the device alone skips, through torch's fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def check_fused(base: Optimizer) -> None:
    """Raise ValueError unless the device can skip a step of this optimizer."""
    if not all(group.get("fused") for group in base.param_groups):
        raise ValueError(
            "capturable=True needs a base optimizer with fused=True, e.g. SGD or AdamW; this"
            f" {type(base).__name__} would have to be told by the host whether to skip a step"
        )
    if isinstance(base, SGD) and any(group["momentum"] and group["dampening"] for group in base.param_groups):
        raise ValueError("capturable=True does not go with dampening, which SGD leaves out of its first step alone")


def step_where_finite(base: Optimizer, finite: Sequence[Tensor], scaled: Any) -> Tensor:
    """Make a step unless something was not finite; the host reads nothing.

    Args:
        base: optimizer that `check_fused` accepts.
        finite: 0-d bools, whether each ascent was finite, perhaps on several devices.
        scaled: object that a gradient scaler has left `found_inf` and `grad_scale` on, if it has. An overflow that the
            scaler has found skips the step too, but is the scaler's own business.

    Returns:
        1 if an ascent was not finite, else 0, as a 0-d int64 tensor.
    """
    grads = [p.grad for group in base.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        base.step()
        return torch.zeros((), dtype=torch.int64)
    device = grads[0].device
    skipped = torch.zeros((), device=device)
    for flag in finite:
        skipped = torch.maximum(skipped, flag.to(device, non_blocking=True).logical_not().float())
    overflow: Tensor | None = getattr(scaled, "found_inf", None)
    _start_momentum(base)
    carrier: Any = base
    carrier.found_inf = skipped if overflow is None else torch.maximum(skipped, overflow.to(device))
    carrier.grad_scale = getattr(scaled, "grad_scale", None)
    try:
        base.step()
    finally:
        del carrier.found_inf, carrier.grad_scale
    return skipped.long()


def _start_momentum(base: Optimizer) -> None:
    """Start the momentum at zero where there is none, because a first step that is skipped would not initialise it."""
    if isinstance(base, SGD):
        for group in base.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if p.grad is not None and base.state[p].get("momentum_buffer") is None:
                    base.state[p]["momentum_buffer"] = torch.zeros_like(p)
