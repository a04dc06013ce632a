"""What a gradient scaler (fp16 autocast) asks of the optimizer, and is told by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amp_plugin.core.ascending import Ascending


def scale_of(scaler: Any) -> float | Tensor:
    """What a gradient scaler multiplies the loss by, on the device, so that nobody waits for it; 1 without a scaler."""
    if scaler is None:
        return 1.0
    scale: Tensor | None = scaler._get_scale_async()
    return float(scaler.get_scale()) if scale is None else scale  # before the first loss it is only a number


class Scaled(Ascending):
    """The part of :class:`amp_plugin.AMP` that knows of `torch.amp.GradScaler`.

    Attributes:
        found_inf: set by a scaler for the time of its call of ``step()``: whether a gradient overflowed.
        grad_scale: and what the gradients are still to be divided by; None if that is done.
    """

    found_inf: Tensor
    grad_scale: Tensor | None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a gradient scaler calls step() even after an overflow, with `found_inf` and `grad_scale` set.

        It has to where the weights are displaced, or they would stay so, and where a closure is to be refused.
        Elsewhere it skips the step itself, as hosts expect: accelerate then leaves the schedule where it is.
        """
        return self._open or not (self._ascents or self._finished or self._plain)

    @torch.no_grad()
    def pass_on_overflow(self) -> None:
        """Tell a gradient scaler of an ascent that was not finite: a gradient of the descent becomes infinite.

        To be called after the last backward pass, before the scaler's ``unscale_`` or ``step``. The scaler then skips
        the step and lowers its scale. Without this call the step is skipped all the same, but the scale stays.
        """
        filled = [grad for grad in self.gradients() if grad.numel()] if self._ascents else []
        for grad in filled[:1]:
            if self.capturable and self._perturbation.finite is not None:
                grad.add_(torch.where(self._perturbation.finite.to(grad.device), 0.0, torch.inf))
            elif not self.ascent_was_finite():
                grad.fill_(torch.inf)

    def _refuse_scaled_closure(self) -> None:
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "a gradient scaler cannot drive step(closure), because the closure's gradients carry the loss scale;"
                " use backward(), ascend(grad_scale=scaler.get_scale()), backward(), scaler.step(optimizer), or"
                " bfloat16, which needs no scaler"
            )

    def _scaler_found_inf(self) -> bool:
        """Whether a scaler makes this call, and has found an overflow; if not, its scale is divided out."""
        if not hasattr(self, "found_inf"):
            return False
        if self.found_inf.item():
            return True
        if self.grad_scale is not None:  # not unscaled yet
            torch._foreach_div_(self.gradients(), self.grad_scale.item())
        return False
