"""Policies that ascend along what is there already, without a pass of their own: `stale` and `momentum`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from amp_plugin.core.norms import local_tensor
from amp_plugin.core.policies.policy import CountsSteps
from amp_plugin.core.sharding import redistribute_like

_KEY = "ascent_gradient"
_NORMALISED = {"Adopt", "LaProp", "NovoGrad", "NvNovoGrad"}


class Remembered(CountsSteps):
    """A policy whose direction comes from earlier steps, so the first step of a training has no perturbation."""

    cost = 0.0

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Return whether this is any step but the first."""
        return bool(state["ascent_step"] > 0)

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return copies of what was kept for the parameters that are trained."""
        kept = {p: self._kept(base, p) for p in ball if p.requires_grad}
        return {p: tensor.clone() for p, tensor in kept.items() if tensor is not None}

    @abstractmethod
    def _kept(self, base: Optimizer, param: Tensor) -> Tensor | None:
        """Return what was kept for a parameter, not a copy; None if nothing was."""


@dataclass
class Stale(Remembered):
    """Ascend along the gradient that the previous step has descended along.

    The policy approximates the gradient of this batch at theta by that of the batch before, at the perturbed weights
    before (and as the base optimizer got it, which is clipped if the loop clips). A step costs 1 pass, one more
    copy of the perturbed parameters, ``state[param]["ascent_gradient"]``, saved and loaded with the optimizer's
    state, and for a moment a second copy. The first step has no perturbation, nor has a parameter without a gradient in
    the step before. No step has a pass at the unperturbed weights, so the loss at them is not known.
    """

    name = "stale"
    copies = 1

    def _kept(self, base: Optimizer, param: Tensor) -> Tensor | None:
        kept: Tensor | None = base.state.get(param, {}).get(_KEY)
        return kept

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Keep a copy of each gradient, because torch's SGD writes into gradients; drop those of a step without one.

        A new copy goes into the state after the step, because optimizers fill a parameter's state when it is empty.
        """
        ball = list(ball)
        grads = {p: redistribute_like(p.grad, p) for p in ball if p.requires_grad and p.grad is not None}
        if ball and not grads:
            warnings.warn("AMP: no gradient was left for the next step to ascend along", RuntimeWarning, stacklevel=5)
        copies = {p: self._kept(base, p) for p in grads}
        new = {p: torch.empty_like(p) for p, copy in copies.items() if copy is None}
        kept = [local_tensor(new[p] if copy is None else copy) for p, copy in copies.items()]
        if kept:
            torch._foreach_copy_(kept, [local_tensor(grad) for grad in grads.values()])
        with super().around_step(base, ball):
            yield
        for p, copy in new.items():
            base.state[p][_KEY] = copy
        now = {id(p) for p in grads}
        for p in (p for group in base.param_groups for p in group["params"] if id(p) not in now):
            base.state.get(p, {}).pop(_KEY, None)


@dataclass
class Momentum(Remembered):
    """Ascend along the base optimizer's momentum, which is a mean of gradients of the steps before.

    The policy approximates the gradient of this batch at theta by that mean. A step costs 1 pass, and no memory beyond
    a copy for a moment. The first step has no perturbation, and no step has a pass at the unperturbed weights.

    The direction is the buffer itself, which adds up gradients, while the optimizer steps along its negative. (Code
    that perturbs along the last update goes downhill.) AMP does not normalise its step, so SGD's buffer, a sum, is made
    a mean, ``buffer * (1 - momentum) / (1 - dampening)``; Adam's ``exp_avg`` is a mean already. SGD's buffer contains
    the weight decay. Optimizers whose ``exp_avg`` is of normalised gradients (ADOPT, LaProp, NovoGrad) are refused.
    """

    name = "momentum"

    def _kept(self, base: Optimizer, param: Tensor) -> Tensor | None:
        if type(base).__name__ in _NORMALISED:
            return None
        state = base.state.get(param, {})
        kept: Tensor | None = state.get("momentum_buffer") if isinstance(base, SGD) else state.get("exp_avg")
        return kept

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the buffers, as means of gradients.

        Raises:
            RuntimeError: the base optimizer keeps no such mean.
        """
        ball = list(ball)
        found = super().directions(base, ball)
        if ball and not found:
            raise RuntimeError(
                f"ascent={str(self)!r}: {type(base).__name__} keeps nothing to ascend along; momentum needs"
                " torch.optim.SGD with momentum > 0, or an optimizer of Adam's kind, whose exp_avg is of gradients; and"
                " a parameter in the ball that is trained"
            )
        for group in base.param_groups:
            factor = (1.0 - group["momentum"]) / max(1.0 - group["dampening"], 1e-12) if isinstance(base, SGD) else 1.0
            if group.get("maximize"):
                factor = -factor  # what went into the buffer was the negative gradient
            if factor != 1.0 and (tensors := [local_tensor(found[p]) for p in group["params"] if p in found]):
                torch._foreach_mul_(tensors, factor)
        return found
