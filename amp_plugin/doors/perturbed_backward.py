"""The backward pass of a forward pass that ran at theta + delta: the weights are there for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.utils.weak import TensorWeakRef

from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.compilation import detached_for_good, not_compiled
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
        self._outputs: list[TensorWeakRef] = []

    def watch(self, outputs: Sequence[Tensor]) -> None:
        """Remember the loss and the other outputs, for as long as the loop keeps them."""
        self._outputs = [TensorWeakRef(output) for output in outputs]

    @not_compiled
    def begin(self, moved: tuple[Tensor, ...], grad: Tensor | None, *others: Tensor | None) -> Tensor | None:
        """Go to theta + delta until the backward pass ends; return the gradient of the loss there.

        Args:
            moved: values of the parameters at theta + delta.
            grad: upstream gradient of the clean loss, 0-d or of one element; None if nobody differentiates the loss.
            others: upstream gradients of the other outputs, which have to be None.
        """
        amp = self.amp
        self._check_others(others)
        if grad is None:
            return None
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

    def _check_others(self, grads: Sequence[Tensor | None]) -> None:
        """Raise RuntimeError if the loop differentiates outputs beside the loss, which the ascent knew nothing of."""
        loss, *others = [ref() for ref in self._outputs]
        wrappers = _hooks(loss)  # FSDP hooks every output of a module around this one, and is content with the loss
        wanted = any(other.retains_grad or _hooks(other) - wrappers for other in others if other is not None)
        if wanted or any(grad is not None for grad in grads):
            raise RuntimeError(
                "the loop differentiates another output of an attached module than its loss, but the ascent was along"
                " the gradient of that loss alone; compute the whole loss inside the attached module, e.g."
                " amp_plugin.LossModule(model, criterion), and call register_hook() and retain_grad() there. In"
                " transformers, where the Trainer computes the loss (TRL's do): class"
                " MyTrainer(amp_plugin.AMPMixin, TheirTrainer)"
            )


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
    """The autograd function that gives the loss its value at theta and its gradient at theta + delta.

    The other outputs of the module go through it unchanged, so that a gradient which arrives at one of them is noticed.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, descent: PerturbedBackward, clean: Tensor, loss: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the loss at theta, whose tensor is given away, and the other outputs."""
        ctx.descent = descent  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*descent.moved)  # autograd frees them after the backward pass
        descent.moved = []
        ctx.loss = loss.detach()  # type: ignore[attr-defined]  # alive in the backward pass, as in those of the ascent
        # Unlike the tensors themselves, which autograd would make views of, detached ones may be changed in place.
        return clean.detach(), *(detached_for_good(other) for other in others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Move the weights to theta + delta, and pass the gradient on to the loss there."""
        return None, None, ctx.descent.begin(ctx.saved_tensors, *grads), *grads[1:]


def _hooks(tensor: Tensor | None) -> set[Callable[[Tensor], Tensor | None]]:
    return set() if tensor is None else set((tensor._backward_hooks or {}).values())


def _power_of_two(grad: Tensor) -> Tensor:
    """Return the largest power of two up to the size of a gradient, because scaling by it is exact; 1 for 0 and NaN."""
    size = grad.detach().abs().float().flatten()[0]
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    return torch.where((size > 0) & torch.isfinite(size), power, 1.0)
