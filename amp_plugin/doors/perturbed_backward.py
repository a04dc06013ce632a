"""The backward pass of a forward pass that ran at theta + delta: the weights are there for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.module_state import ModuleState
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.perturbation import Displacement
from amp_plugin.core.replay import ExtraPasses


class PerturbedBackward:
    """The backward pass that belongs to one perturbed forward pass.

    Args:
        amp: optimizer whose weights move.
        passes: guard of the module's buffers, which a backward pass with checkpointing writes to again.
        displacement: theta + delta of the forward pass.
        seen: state of the module as the forward pass has left it.
        note_scale: function that is told the upstream gradient of the loss, rounded down to a power of two.
    """

    def __init__(
        self,
        amp: AMP,
        passes: ExtraPasses,
        displacement: Displacement,
        seen: ModuleState,
        note_scale: Callable[[Tensor], None],
    ) -> None:
        self.amp, self.passes, self.seen, self.note_scale = amp, passes, seen, note_scale
        # The copies of the moved weights are apart, because autograd keeps and frees them: see AtDisplacement.
        self.moved = displacement.moved
        self.displacement = displacement._replace(moved=[])

    @not_compiled
    def begin(self, moved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        """Go to theta + delta until the backward pass ends; return the gradient of the loss there.

        Args:
            moved: values of the parameters at theta + delta.
            grad: upstream gradient of the clean loss, 0-d or of one element.
        """
        amp = self.amp
        if not amp.attached:
            raise RuntimeError("detach() was called between the forward and the backward pass")
        if amp.perturbed:
            raise RuntimeError(
                "two losses of an attached module in one backward pass, each with a perturbation of its own; call"
                " backward() on each, or attach to a module that adds them up"
            )
        try:
            amp.perturbation.resume(self.displacement._replace(moved=list(moved)))
            # A negative factor between the module and backward() is seen only now, when the ascent was made.
            factor = None if amp.capturable else AsyncScalar(grad.detach().reshape(()))
            end = _BackwardEnd(amp, self.displacement, factor, self.passes.backward(self.seen))
            torch.autograd.Variable._execution_engine.queue_callback(end)
        except BaseException:
            amp.restore()
            raise
        self.note_scale(_power_of_two(grad))
        finite = self.displacement.finite
        # An ascent that overflowed must reach whoever looks at the gradients: the gradient scaler, other processes.
        return grad if finite is None else torch.where(finite.to(grad.device), grad, torch.nan)


class _BackwardEnd:
    """The callback that leads back to theta at the end of a backward pass.

    When the backward pass fails, the engine does not call it but deletes it, so its deletion leads back as well.
    """

    def __init__(
        self,
        amp: AMP,
        displacement: Displacement,
        factor: AsyncScalar | None,
        buffers: AbstractContextManager[None],
    ) -> None:
        self._there = ExitStack()  # open while the weights are at theta + delta
        self._factor = factor
        self._amp, self._displacement = amp, displacement
        self._there.callback(amp.restore)
        self._there.enter_context(buffers)

    @not_compiled
    def __call__(self) -> None:
        try:
            self._there.close()
            self._amp.progress.descents.append(self._displacement)
            if self._factor is not None:
                self._amp.progress.factors.append(self._factor)
        except BaseException:  # an interrupt
            self._amp.restore()
            raise

    @not_compiled
    def __del__(self) -> None:
        self._there.close()


class AtDisplacement(Function):
    """The autograd function that gives the loss its value at theta and its gradient at theta + delta."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, clean: Tensor, descent: PerturbedBackward) -> Tensor:
        """Return the loss at theta, in the dtype of the loss at theta + delta."""
        ctx.descent = descent  # type: ignore[attr-defined]
        ctx.save_for_backward(*descent.moved)  # autograd frees them after the backward pass
        descent.moved = []
        return clean.to(loss).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Move the weights to theta + delta, and pass the gradient on to the loss there."""
        return ctx.descent.begin(ctx.saved_tensors, grads[0]), None, None


def _power_of_two(grad: Tensor) -> Tensor:
    """Return the largest power of two up to the size of a gradient, because scaling by it is exact; 1 for 0 and NaN."""
    size = grad.detach().abs().float().flatten()[0]
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    return torch.where((size > 0) & torch.isfinite(size), power, 1.0)
