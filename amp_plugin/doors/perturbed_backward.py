"""The backward pass of a forward pass that ran at theta + delta: there for as long as it lasts, and back."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.perturbation import Displacement
from amp_plugin.core.replay import SeenBuffer

if TYPE_CHECKING:
    from amp_plugin.doors.attach import Attachment


class Descent:
    """The backward pass of one perturbed forward pass."""

    def __init__(self, attachment: Attachment, displacement: Displacement, seen: list[SeenBuffer]) -> None:
        self.attachment = attachment
        self.seen = seen
        self.moved = displacement.moved
        self.displacement = displacement._replace(moved=[])

    @not_compiled
    def begin(self, moved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        """Go to theta + delta until the backward pass ends; returns the gradient of the loss there."""
        amp, passes = self.attachment.amp, self.attachment.passes
        if amp is None or passes is None:
            raise RuntimeError("detach() was called between the forward and the backward pass")
        if amp.perturbed:
            raise RuntimeError(
                "two losses of an attached module in one backward pass, each with a perturbation of its own; call"
                " backward() on each, or attach to a module that adds them up"
            )
        try:
            amp.resume(self.displacement._replace(moved=list(moved)))
            end = _End(amp, self.displacement, passes.backward(self.seen))
            torch.autograd.Variable._execution_engine.queue_callback(end)
        except BaseException:
            amp.restore()
            raise
        self.attachment.grad_scale = _power_of_two(grad)
        finite = self.displacement.finite
        # An ascent that overflowed must reach whoever looks at the gradients: the gradient scaler, other processes.
        return grad if finite is None else torch.where(finite.to(grad.device), grad, torch.nan)


class _End:
    """Called when the backward pass is over; merely deleted, with the engine's record of it, when it fails."""

    def __init__(self, amp: AMP, displacement: Displacement, buffers: AbstractContextManager[None]) -> None:
        self._there = ExitStack()
        self._amp, self._displacement = amp, displacement
        self._there.callback(amp.restore)
        self._there.enter_context(buffers)

    @not_compiled
    def __call__(self) -> None:
        try:
            self._there.close()
            self._amp.finish(self._displacement)
        except BaseException:  # an interrupt
            self._amp.restore()
            raise

    @not_compiled
    def __del__(self) -> None:
        self._there.close()


class AtDisplacement(Function):
    """The value of the clean loss, the gradient of the perturbed one."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, clean: Tensor, descent: Descent) -> Tensor:
        """The clean loss."""
        ctx.descent = descent  # type: ignore[attr-defined]
        ctx.save_for_backward(*descent.moved)  # autograd frees them after the backward pass
        descent.moved = []
        return clean.to(loss).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient goes on to the perturbed loss, with the weights there."""
        return ctx.descent.begin(ctx.saved_tensors, grads[0]), None, None


def _power_of_two(grad: Tensor) -> Tensor:
    """The largest power of two that is no larger; scaling by it is exact. 1 for what is zero or not finite."""
    size = grad.detach().abs().float().flatten()[0]
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    return torch.where((size > 0) & torch.isfinite(size), power, 1.0)
