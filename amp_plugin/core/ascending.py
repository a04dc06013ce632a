"""The way up: an optimizer whose steps make passes before that of the descent.

What passes those are, the ascent policy decides. Every door of AMP asks :meth:`Ascending.passes_of_step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.displacing import Displacing
from amp_plugin.core.distributed import in_process_group
from amp_plugin.core.perturbation import Norm
from amp_plugin.core.policies import AscentPolicy, Parameters, make_policy


class Ascending(Displacing):
    """The part of :class:`amp_plugin.AMP` that perturbs the weights as the ascent policy says."""

    inner_iter: int
    policy: AscentPolicy
    total_steps: int | None
    _costs: list[float]
    _unreached: list[Tensor]

    def __init__(
        self,
        base: Optimizer,
        *,
        epsilon: float,
        inner_lr: float,
        inner_iter: int,
        norm: Norm,
        ascent: str | AscentPolicy,
        parameters: Parameters | None,
        capturable: bool,
    ) -> None:
        self.inner_iter = inner_iter
        self.policy = make_policy(ascent)
        if capturable and self.policy.name != "full":
            raise ValueError(f'capturable=True replays one step: it needs ascent="full", got {str(self.policy)!r}')
        if not self.policy.cost and inner_iter > 1:
            raise ValueError(f"ascent={str(self.policy)!r} has one direction: inner_iter must be 1, got {inner_iter}")
        self.total_steps = None
        options = {"epsilon": epsilon, "inner_lr": inner_lr, **self.policy.state}
        super().__init__(base, options, norm=norm, parameters=parameters, capturable=capturable)

    @property
    def perturbs(self) -> bool:
        """Whether the hyper-parameters ask for any perturbation at all; if not, AMP is its base optimizer."""
        return self.inner_iter > 0 and any(g["epsilon"] > 0 and g["inner_lr"] > 0 for g in self.param_groups)

    @property
    def ascends(self) -> bool:
        """Whether the coming step, or the one under way, perturbs the weights; if not, it is the base optimizer's."""
        return self.perturbs and self.policy.ascends(self.param_groups[0], self.total_steps)

    @property
    def passes(self) -> float:
        """Forward and backward passes over the batch of the step under way so far, or else of the last step.

        Ascents on a part of the batch count as that part. Where each micro-batch is perturbed for itself, the mean.
        """
        return 1.0 + (sum(self._costs) / len(self._costs) if self._costs else 0.0)

    def ascent_passes(
        self, batches: Sequence[Any] | None = None, *, grad_scale: float | Tensor = 1.0
    ) -> Iterator[Sequence[Any]]:
        """The passes that come before the descent's: make one in each turn; the weights are moved after it.

        There are ``inner_iter`` of them where the policy asks for them, else none::

            for micro_batches in optimizer.ascent_passes([(x, y)]):
                for x_, y_ in micro_batches:
                    loss_fn(model(x_), y_).backward()
            loss_fn(model(x), y).backward()
            optimizer.step()

        After the last turn the weights are at theta + delta (or at theta, if this step does not ascend) and the
        gradients are cleared. Leaving the loop early puts the weights back.

        Args:
            batches: the micro-batches of the step; a policy that ascends on a part of them cannot do without.
            grad_scale: what the loss was multiplied by, see :meth:`ascend`.

        Yields:
            The micro-batches to run. Their gradients add up, so they have to be divided as those of the descent are.

        Raises:
            RuntimeError: a pass left no gradient, or a module is attached, which makes the passes itself.
            ValueError: the policy cannot be followed here.
        """
        self._refuse_attached()
        try:
            for part in self.passes_of_step(batches, grad_scale, prune=not in_process_group()):
                yield part
                self.require_gradients()
        except BaseException:
            self.restore()
            raise

    def passes_of_step(
        self, batches: Sequence[Any] | None, grad_scale: float | Tensor = 1.0, *, prune: bool = True
    ) -> Iterator[Sequence[Any]]:
        """:meth:`ascent_passes` for a door that knows what it does.

        Args:
            batches: see there.
            grad_scale: see there.
            prune: whether parameters outside the ball may require no gradient during the passes, which saves that
                part of the backward pass; then DDP must not synchronise them.
        """
        self._begin()
        if not self.ascends:
            self._plain = True
            return
        if not self.policy.cost:
            self._ascend(directions=self.policy.directions(self.base_optimizer, self._in_ball()))
            return
        part, share = self.policy.part(batches)
        for _ in range(self.inner_iter):
            with self.ball.pruned(self.param_groups if prune else []) as outside:
                yield part
            if outside:
                self._unreached = [p for p in self._in_ball() if p.grad is None]
            self._ascend(grad_scale, share)

    @torch.no_grad()
    def ascend(self, *, grad_scale: float | Tensor = 1.0) -> None:
        """Take one ascent step along ``.grad`` and clear the gradients; the weights are now at theta + delta.

        To be called ``inner_iter`` times before :meth:`step`, each time after a backward pass. With a gradient scaler
        call :meth:`pass_on_overflow` before :meth:`step`. Under DDP, if the backward pass was in ``no_sync()``, so that
        each process perturbs along its own gradient, first call
        ``amp_plugin.core.distributed.share_overflow(parameters)`` (also in a closure):
        else a process whose gradient is not finite would skip the step alone.

        In a step that needs no gradient here (:attr:`ascends` is False, or the policy has a direction already), the
        gradients are cleared all the same and the loop stays right, but a pass is wasted: use :meth:`ascent_passes`.

        Args:
            grad_scale: what the loss was multiplied by (a gradient scaler's scale); divided out here, since
                AMP, unlike SAM, does not normalise the gradient.

        Raises:
            RuntimeError: no parameter has a gradient, or one is sparse; or an attached module makes the ascent.
            ValueError: the policy needs the batch, see :meth:`ascent_passes`.
        """
        self._refuse_attached()
        if self.perturbs and not (self.ascends and self.policy.cost):
            self._waste_pass()
            return
        self.require_gradients()
        _, share = self.policy.part(None)
        try:
            self._ascend(grad_scale, share)
        except BaseException:
            self.restore()
            raise

    def _reset(self, norm: Norm, capturable: bool) -> None:
        super()._reset(norm, capturable)
        self._unreached = []  # of the ball, when other parameters required no gradient
        self._plain = False  # whether a door was told that this step does not ascend
        self._costs, self._stepped = [], True  # of each ascent, in passes; whether that was in the step before

    def _begin(self) -> None:
        """Something is done for a step; forget the costs of the one before."""
        if self._stepped:
            self._costs, self._stepped = [], False

    def _ascend(
        self, grad_scale: float | Tensor = 1.0, cost: float = 1.0, directions: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Move, along the gradients or else the directions, which are consumed."""
        self._begin()
        if not self._open:
            self._costs.append(0.0)
        self._displace(grad_scale, directions)
        self._costs[-1] += cost if directions is None else 0.0

    def _warn_unreached(self) -> None:
        """In the descent, where every parameter may require a gradient again."""
        unreached, self._unreached = self._unreached, []
        if number := sum(p.grad is not None for p in unreached):
            self._warn_once(
                f"AMP: {number} parameters of the ball (parameters={self.ball.parameters!r}) have a gradient, but had"
                " none in the ascent pass, so they were not perturbed: gradient checkpointing with use_reentrant=True"
                " drops the gradients behind an input that requires none; take use_reentrant=False"
            )

    def _waste_pass(self) -> None:
        """:meth:`ascend` in a step that needs no gradient of this batch."""
        self._begin()
        wasted = bool(self.gradients())
        self._set_grads({})
        for _ in self.passes_of_step(None):
            pass
        if wasted:
            self._costs = [*(self._costs or [0.0])]
            self._costs[-1] += 1.0
            self._warn_once(
                f"AMP: ascent={str(self.policy)!r} needs no gradient in this step, so the backward pass before ascend()"
                " was wasted; make the ascent's passes in `for _ in optimizer.ascent_passes():`"
            )

    def _refuse_attached(self) -> None:
        if self.attached:
            raise RuntimeError("the attached module makes the ascent: call backward() and step(), or detach it first")
