"""What `torch.amp.GradScaler` (fp16 autocast) tells an optimizer in its call of ``step()``, and is told by AMP.

A scaler sets two attributes on the optimizer for the time of that call: ``found_inf``, a 0-d tensor that is 1 if a
gradient overflowed, and ``grad_scale``, a 0-d tensor that the gradients are still to be divided by, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.norms import entries_of
from amp_plugin.core.perturbation import Perturbation
from amp_plugin.core.step import Step


def scale_of(scaler: Any) -> float | Tensor:
    """Return what a scaler multiplies the loss by: a 0-d tensor on the device, so that nobody waits; 1 without one."""
    if scaler is None or not scaler.is_enabled():
        return 1.0
    scale: Tensor | None = scaler._get_scale_async()
    return float(scaler.get_scale()) if scale is None else scale  # before the first loss the scale is only a number


def check_closure(optimizer: Optimizer) -> None:
    """Raise RuntimeError if a scaler is making this call of ``step(closure)``."""
    if hasattr(optimizer, "found_inf"):
        raise RuntimeError(
            "a gradient scaler cannot drive step(closure), because the closure's gradients carry the loss scale;"
            " use backward(), ascend(grad_scale=scaler.get_scale()), backward(), scaler.step(optimizer), or"
            " bfloat16, which needs no scaler"
        )


def found_overflow(optimizer: Any, gradients: Callable[[], list[Tensor]]) -> bool:
    """Return whether a scaler makes this call of ``step()`` and has found an overflow; if not, divide by its scale."""
    if not hasattr(optimizer, "found_inf"):
        return False
    if optimizer.found_inf.item():
        return True
    if optimizer.grad_scale is not None:  # the scaler has not unscaled the gradients yet
        torch._foreach_div_(gradients(), optimizer.grad_scale.item())
    return False


def spoil(gradients: Sequence[Tensor], perturbation: Perturbation, *, on_device: bool) -> None:
    """Make the first gradient infinite if the ascent was not finite, so that a scaler finds an overflow.

    Args:
        gradients: gradients of the descent.
        perturbation: the ball in which the ascent was made.
        on_device: whether the device alone decides, so that the host does not wait; default none.
    """
    # An empty one could not carry the infinity.
    for grad in [entries for grad in gradients if (entries := entries_of(grad)).numel()][:1]:
        if on_device and perturbation.finite is not None:
            grad.add_(torch.where(perturbation.finite.to(grad.device), 0.0, torch.inf))
        elif not perturbation.was_finite():
            grad.fill_(torch.inf)


def takes_overflowed_steps(progress: Step, *, capturable: bool) -> bool:
    """Return whether a scaler shall call ``step()`` even after an overflow, instead of skipping the step by itself.

    It has to where the weights are moved, or they would stay so, and where a closure is to be refused. Elsewhere it
    skips the step, as hosts expect: accelerate then leaves the schedule where it is. For that the host has to know of
    the overflow, which it does not where the step is captured; there the fused kernel skips the step.
    """
    return capturable or progress.moved or not (progress.ascents or progress.descents or progress.plain)
