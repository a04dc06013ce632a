"""Policies that ascend along what is there already, without a pass of their own: `stale` and `momentum`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from amp_plugin.ascent.policy import CountsSteps
from amp_plugin.norms import plain_part
from amp_plugin.sharding import laid_out_like

_KEY = "ascent_gradient"


class Remembered(CountsSteps):
    """A policy whose direction comes from earlier steps, so the first step of a training has no perturbation."""

    cost = 0.0

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """In every step but the first."""
        return bool(state["ascent_step"] > 0)

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Copies of what was kept.

        Raises:
            RuntimeError: nothing was kept for any parameter.
        """
        kept = {p: tensor for p in ball if (tensor := self._kept(base, p)) is not None}
        if not kept:
            raise RuntimeError(
                f"ascent={str(self)!r}: {type(base).__name__} keeps nothing to ascend along; {self._needs()}"
            )
        return {p: tensor.clone() for p, tensor in kept.items()}

    @abstractmethod
    def _kept(self, base: Optimizer, param: Tensor) -> Tensor | None:
        """What there is for a parameter; not a copy."""

    @abstractmethod
    def _needs(self) -> str:
        """What is missing if there is nothing for any."""


@dataclass
class Stale(Remembered):
    """Ascend along the gradient that the previous step has descended along.

    Approximates the gradient of this batch at theta by that of the batch before, at the perturbed weights before (and
    as the base optimizer got it: clipped, if the loop clips). Cost of a step: 1 pass, and one more copy of the
    perturbed parameters, ``state[param]["ascent_gradient"]``, saved and loaded with the optimizer's state; a second
    one for a moment. The first step has no perturbation, and no step has a pass at the unperturbed weights, so the
    loss at them is not known.
    """

    name = "stale"
    copies = 1

    def _kept(self, base: Optimizer, param: Tensor) -> Tensor | None:
        kept: Tensor | None = base.state.get(param, {}).get(_KEY)
        return kept

    def _needs(self) -> str:
        return "none of the perturbed parameters had a gradient in the steps before"

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Keep the gradient: a copy, because torch's SGD writes into it.

        A new one goes into the state after the step, because optimizers fill a parameter's state when it is empty.
        """
        grads = {p: laid_out_like(p.grad, p) for p in ball if p.grad is not None}
        copies = {p: self._kept(base, p) for p in grads}
        new = {p: torch.empty_like(p) for p, copy in copies.items() if copy is None}
        kept = [plain_part(new[p] if copy is None else copy) for p, copy in copies.items()]
        if kept:
            torch._foreach_copy_(kept, [plain_part(grad) for grad in grads.values()])
        with super().around_step(base, ball):
            yield
        for p, copy in new.items():
            base.state[p][_KEY] = copy


@dataclass
class Momentum(Remembered):
    """Ascend along the base optimizer's momentum, which is a mean of gradients of the steps before.

    Approximates the gradient of this batch at theta by that mean. Cost of a step: 1 pass, and no memory beyond a copy
    for a moment. The first step has no perturbation, and no step has a pass at the unperturbed weights.

    The direction is the buffer itself: it adds up gradients, and the optimizer steps along its negative. (Code that
    perturbs along the last update goes downhill.) AMP does not normalise its step, so SGD's buffer, a sum, is made a
    mean, ``buffer * (1 - momentum) / (1 - dampening)``; Adam's ``exp_avg`` is one. SGD's contains the weight decay.
    """

    name = "momentum"

    def _kept(self, base: Optimizer, param: Tensor) -> Tensor | None:
        state = base.state.get(param, {})
        kept: Tensor | None = state.get("momentum_buffer") if isinstance(base, SGD) else state.get("exp_avg")
        return kept

    def _needs(self) -> str:
        return "momentum needs torch.optim.SGD with momentum > 0, or an optimizer of Adam's kind, with exp_avg"

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """The buffers, as means of gradients."""
        found = super().directions(base, ball)
        for group in base.param_groups if isinstance(base, SGD) else ():
            mean = (1.0 - group["momentum"]) / max(1.0 - group["dampening"], 1e-12)
            tensors = [plain_part(found[p]) for p in group["params"] if p in found]
            if tensors:
                torch._foreach_mul_(tensors, mean)
        return found
