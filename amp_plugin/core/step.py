"""How far one training step of AMP has come, from its first ascent to the base optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.norms import entries_of
from amp_plugin.core.perturbation import Displacement


@dataclass
class Step:
    """One training step. A `Step` is never saved; a new one takes its place when the base optimizer has stepped.

    Where the weights are and what may come next follow from what is set:

    ===========================  =============  =============================================================
    what is set                  weights        what may come next
    ===========================  =============  =============================================================
    nothing                      theta          an ascent; ``step()`` is an error if the policy wants one
    ``moved``, ``ascents``       theta + delta  the next ascent, or the backward pass of the descent
    ``ascents`` without `moved`  theta          ``step()``, with the gradient that was taken at theta + delta
    ``descents``                 theta          ``step()``, with the gradients of an attached module
    ``plain``                    theta          ``step()``, which is the base optimizer's
    ===========================  =============  =============================================================

    Attributes:
        begun: whether a door has asked for a pass of this step.
        moved: whether the weights are away from theta, between the first ascent and ``restore()``.
        ascents: number of ascents between theta and the theta + delta that the gradient of the descent is taken at.
        plain: whether the policy was asked and wants no ascent in this step, or nothing in the ball is trained.
        aimless: whether a pass that the loop itself has made for an ascent has left no gradient at all.
        idle: whether the door has made all passes, and none of them has left a gradient.
        descents: points theta + delta at which an attached module has finished a backward pass, one a micro-batch.
        factors: for each of these, what the loss was multiplied by after it left the module.
        unread: `factors` of the step before, which the host looks at now, when they have arrived; None in the first
            step, whose own it waits for.
        costs: price of going from theta to each theta + delta, in forward and backward passes over the batch; there
            are several where each micro-batch is perturbed for itself.
        rest: micro-batches that the pass of the descent is to be on and was not given yet, where these are not all.
        unreached: parameters in the ball that got no gradient in an ascent pass, while those outside required none.
        set_aside: gradients from before ``step(closure)``, while the closure runs; None while no closure runs.
    """

    begun: bool = False
    moved: bool = False
    ascents: int = 0
    plain: bool = False
    aimless: bool = False
    idle: bool = False
    descents: list[Displacement] = field(default_factory=list)
    factors: list[AsyncScalar] = field(default_factory=list)
    unread: list[AsyncScalar] | None = None
    costs: list[float] = field(default_factory=list)
    rest: Sequence[Any] | None = None
    unreached: list[Tensor] = field(default_factory=list)
    set_aside: dict[Tensor, Tensor] | None = None

    @property
    def passes(self) -> float:
        """Forward and backward passes over the batch so far, with the one of the descent."""
        return 1.0 + (sum(self.costs) / len(self.costs) if self.costs else 0.0)

    @property
    def in_closure(self) -> bool:
        """Whether ``step(closure)`` is running its closure now."""
        return self.set_aside is not None

    def were_finite(self, gradients: Callable[[], Iterable[Tensor]]) -> bool:
        """Return whether all gradients of the attached module's ascents were finite.

        The gradient of a descent whose ascent was not finite is NaN. Where gradients are finite all the same, the loop
        has zeroed that one since, and nothing of it is left.
        """
        if all(d.was_finite() for d in self.descents):
            return True
        filled = [entries for grad in gradients() if (entries := entries_of(grad)).numel()]
        return bool(filled) and all(bool(grad.isfinite().all()) for grad in filled)

    def drop_gradients(self) -> None:
        """Forget what ``zero_grad()`` clears: gradients set aside, and ascents whose descent has no gradient now."""
        if self.set_aside is not None:
            self.set_aside = {}
        self.descents, self.factors = [], []
        if not self.moved:
            self.ascents = 0

    def suspend(self) -> None:
        """Note that the weights are at theta again between a forward pass at theta + delta and its backward pass."""
        self.moved, self.ascents = False, 0
