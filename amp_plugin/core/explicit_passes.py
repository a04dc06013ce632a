"""The explicit passes: methods of :class:`amp_plugin.AMP` for loops that make the passes of a step themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.distributed import in_process_group
from amp_plugin.core.sharding import is_distributed

if TYPE_CHECKING:
    from amp_plugin.core.optimizer import AMP
    from amp_plugin.core.replay import ExtraPasses


Batches: TypeAlias = Sequence[Any] | None  # the micro-batches of a step, if the loop tells them
Scale: TypeAlias = float | Tensor


def ascent_passes(
    self: AMP, batches: Batches = None, *, grad_scale: Scale = 1.0, passes: ExtraPasses | None = None
) -> Iterator[Sequence[Any]]:
    """Yield once for each ascent pass, which comes before the pass of the descent; move the weights after each.

    There are ``inner_iter`` such passes where the policy asks for them, else none::

        for micro_batches in optimizer.ascent_passes([(x, y)]):
            for x_, y_ in micro_batches:
                loss_fn(model(x_), y_).backward()
        loss_fn(model(x), y).backward()
        optimizer.step()

    After the last turn the weights are at theta + delta (or at theta, if this step does not ascend) and the gradients
    are cleared. Leaving the loop early puts the weights back.

    Args:
        batches: micro-batches of the step; default None. A policy that ascends on a part of them (``"subset(0.5)"``)
            needs them.
        grad_scale: factor that the loss was multiplied by, see :meth:`AMP.ascend`; default 1.
        passes: :class:`amp_plugin.ExtraPasses` that every turn runs under; default None. The loop then makes the pass
            of the descent under ``passes.nth(number_of_turns)``. Gradients of parameters of its module that this
            optimizer does not hold are those of the descent alone.

    Yields:
        The micro-batches to run. Their gradients add up, so each loss is divided by their number, as in the descent.

    Raises:
        RuntimeError: a module is attached, which makes the passes itself.
        ValueError: the policy cannot be followed here.
    """
    _check_not_attached(self)
    try:
        for part in self.passes_of_step(batches, grad_scale, prune=not in_process_group(), passes=passes):
            yield part
            self.progress.aimless |= not self.has_gradients()
    except BaseException:
        self.restore()
        raise


def descent_batches(self: AMP, batches: Sequence[Any]) -> Sequence[Any]:
    """Return the micro-batches that the pass of the descent has to run, of those that :meth:`AMP.ascent_passes` had.

    These are all of them, but with ``"split(0.25)"`` in a step that ascends, which is an error without this call::

        for micro_batches in optimizer.ascent_passes([(x, y)]):
            ...
        micro_batches = optimizer.descent_batches([(x, y)])
        for x_, y_ in micro_batches:
            (loss_fn(model(x_), y_) / len(micro_batches)).backward()

    A guard of these passes, :class:`amp_plugin.ExtraPasses`, is given to :meth:`AMP.ascent_passes` as ``passes=``: only
    then does it know that the running statistics to keep are those of the descent.

    Args:
        batches: micro-batches of the step.
    """
    rest, self.progress.rest = self.progress.rest, None
    return batches if rest is None else rest


@not_compiled
@torch.no_grad()
def ascend(self: AMP, *, grad_scale: Scale = 1.0) -> None:
    """Take one ascent step along ``.grad`` and clear the gradients; the weights are at theta + delta afterwards.

    The loop calls this ``inner_iter`` times before :meth:`AMP.step`, each time after a backward pass. With a gradient
    scaler the loop calls :meth:`AMP.propagate_overflow` before the scaler's ``step``. Under DDP, if the backward pass
    was in ``no_sync()`` and each process perturbs along its own gradient, first call
    ``amp_plugin.core.distributed.share_overflow(parameters)`` (also in a closure): otherwise a process whose gradient
    is not finite would skip the step alone.

    In a step that needs no gradient here (:attr:`AMP.ascends` is False, or the policy knows a direction) the loop
    stays right, but wastes a pass; :meth:`AMP.ascent_passes` does not.

    Args:
        grad_scale: factor that the loss was multiplied by (a gradient scaler's scale), divided out here because AMP,
            unlike SAM, does not normalise the gradient; default 1. A 0-d tensor costs no synchronisation.

    Raises:
        RuntimeError: no parameter has a gradient, or one is sparse; or an attached module makes the ascent.
        ValueError: the policy needs the batch, see :meth:`AMP.ascent_passes`.
    """
    _check_not_attached(self)
    if self.perturbs and not (self.ascends and self.policy.cost):
        _waste_pass(self)
        return
    _check_gradients(self)
    self.others_check.look(self._params())
    _, share, *_ = self.policy.select_batches(None)
    try:
        self._ascend(grad_scale, share)
    except BaseException:
        self.restore()
        raise


def _check_gradients(self: AMP) -> None:
    if not self.has_gradients():
        sharded = any(is_distributed(p) for group in self.param_groups for p in group["params"])
        raise RuntimeError(
            "ascend() found no gradient: call backward() on the loss at the current weights first"
            + ("; under FSDP with gradient synchronisation on, model.set_requires_gradient_sync(True)" * sharded)
        )


def _waste_pass(self: AMP) -> None:
    """Drop a gradient that the policy does not need in this step, and do what the policy does need, if anything."""
    step = self.progress
    step.begun = True
    wasted = self.has_gradients()
    self._set_gradients({})
    for _ in self.passes_of_step(None):  # moves the weights where a direction is known, and yields nothing
        pass
    if wasted:
        step.costs = [*step.costs[:-1], (step.costs[-1] if step.costs else 0.0) + 1.0]
        self.warn_once(
            f"AMP: ascent={str(self.policy)!r} needs no gradient in this step, so the backward pass before ascend()"
            " was wasted; make the ascent's passes in `for _ in optimizer.ascent_passes():`"
        )


def _check_not_attached(self: AMP) -> None:
    if self.attached:
        raise RuntimeError("the attached module makes the ascent: call backward() and step(), or detach it first")
