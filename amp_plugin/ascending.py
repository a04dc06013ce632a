"""The way up: an optimizer that leaves its weights for a worse point nearby, and comes back to the bit.

What passes a step makes, the ascent policy decides. Every door of AMP asks :meth:`Ascending.passes_of_step`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amp_plugin.ascent import AscentPolicy, Parameters, make_policy
from amp_plugin.ascent.parameters import Ball
from amp_plugin.base import check_not_negative
from amp_plugin.distributed import in_process_group
from amp_plugin.norms import LOW_PRECISION
from amp_plugin.perturbation import Ascent, Displacement, Norm, Perturbation
from amp_plugin.sharding import is_distributed
from amp_plugin.wrapper import OptimizerWrapper


class Ascending(OptimizerWrapper):
    """The part of :class:`amp_plugin.AMP` that perturbs the weights."""

    _perturbation_class: ClassVar[type[Perturbation]] = Perturbation
    inner_iter: int
    policy: AscentPolicy
    total_steps: int | None
    attached: bool
    _parked: dict[Tensor, Tensor]
    _finished: list[Displacement]
    _costs: list[float]

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
        self.ball = Ball(parameters)
        self._reset(norm, capturable)
        super().__init__(base, {"epsilon": epsilon, "inner_lr": inner_lr, **self.policy.state})
        self.ball.choose_anew(self.param_groups)

    @property
    def norm(self) -> Norm:
        """Which ball: ``"tensor"`` or ``"global"``."""
        return self._perturbation.norm

    @property
    def perturbs(self) -> bool:
        """Whether the hyper-parameters ask for any perturbation at all; if not, AMP is its base optimizer."""
        return self.inner_iter > 0 and any(g["epsilon"] > 0 and g["inner_lr"] > 0 for g in self.param_groups)

    @property
    def ascends(self) -> bool:
        """Whether the coming step, or the one under way, perturbs the weights; if not, it is the base optimizer's."""
        return self.perturbs and self.policy.ascends(self.param_groups[0], self.total_steps)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at theta + delta now, rather than at theta."""
        return self._perturbation.active

    @property
    def passes(self) -> float:
        """Forward and backward passes over the batch of the step under way so far, or else of the last step.

        Ascents on a part of the batch count as that part. Where each micro-batch is perturbed for itself, the mean.
        """
        return 1.0 + (sum(self._costs) / len(self._costs) if self._costs else 0.0)

    def name_parameters(self, named: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Tell the names of the parameters that ``parameters=`` chooses from, if they are not known yet.

        Needed only where the optimizer was made of parameters without names and is driven by a closure or
        :meth:`ascent_passes`; :func:`amp_plugin.attach` and the hosts know the module and do it.

        Args:
            named: a module, or its ``named_parameters()``.

        Raises:
            ValueError: none is chosen.
        """
        self.ball.choose(self.param_groups, named.named_parameters() if isinstance(named, nn.Module) else named)

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
            with self.ball.pruned(self.param_groups) if prune else nullcontext():
                yield part
            self._ascend(grad_scale, share)

    @torch.no_grad()
    def ascend(self, *, grad_scale: float | Tensor = 1.0) -> None:
        """Take one ascent step along ``.grad`` and clear the gradients; the weights are now at theta + delta.

        To be called ``inner_iter`` times before :meth:`step`, each time after a backward pass. With a gradient scaler
        call :meth:`pass_on_overflow` before :meth:`step`. Under DDP, if the backward pass was in ``no_sync()``, so that
        each process perturbs along its own gradient, first call ``amp_plugin.distributed.share_overflow(parameters)``
        (also in a closure): else a process whose gradient is not finite would skip the step alone.

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

    def restore(self) -> None:
        """Put the exact bits of theta back, if the weights are displaced; drops the ascent."""
        self._perturbation.restore()
        self._open = False
        if self.attached or not self.gradients():
            self._ascents = 0  # no pass at theta + delta was made: a step now would be one without perturbation

    def suspend(self) -> Displacement:
        """Back to theta between a forward pass at theta + delta and its backward pass (:func:`amp_plugin.attach`)."""
        self._open, self._ascents = False, 0
        return self._perturbation.suspend()

    def resume(self, displacement: Displacement) -> None:
        """To theta + delta again, for the backward pass; RuntimeError if the weights have changed since."""
        self._perturbation.resume(displacement)

    def finish(self, displacement: Displacement) -> None:
        """That backward pass is over: the gradients now are those of the descent."""
        self._finished.append(displacement)

    def gradients(self) -> list[Tensor]:
        """The gradients that are there, in the order of the groups."""
        return [p.grad for p in self._params() if p.grad is not None]

    def require_gradients(self) -> None:
        """RuntimeError if there are none."""
        if not self.gradients():
            raise RuntimeError(
                "ascend() found no gradient: call backward() on the loss at the current weights first; under FSDP with"
                " gradient synchronisation on, model.set_requires_gradient_sync(True)"
            )

    def ascent_was_finite(self) -> bool:
        """Whether the last ascent's gradients were all finite; waits for the device if that is not known yet."""
        return self._perturbation.was_finite()

    def statistics(self) -> dict[str, Tensor]:
        """Measures of the last ascent, see :meth:`Perturbation.statistics`; nothing is synchronised."""
        return self._perturbation.statistics()

    def _reset(self, norm: Norm, capturable: bool) -> None:
        """State that lives within one step only and is never saved."""
        self.capturable = capturable
        self._perturbation = self._perturbation_class(norm, tell_host=not capturable)
        self._ascents = 0  # since the last step
        self._open = False  # between the first ascend() and restore() or step()
        self._plain = False  # whether a door was told that this step does not ascend
        self._parked = {}  # gradients from before step(closure)
        self._finished = []  # where an attached module took the gradients that are there
        self._costs, self._stepped = [], True  # of each ascent, in passes; whether that was in the step before
        self.attached = False  # by attach()
        self._warned: set[str] = set()

    def _begin(self) -> None:
        """Something is done for a step; forget the costs of the one before."""
        if self._stepped:
            self._costs, self._stepped = [], False

    def _params(self) -> Iterator[Tensor]:
        # A tensor listed twice is one weight, to be displaced once; torch hashes tensors in Python, ten times slower.
        return iter({id(p): p for group in self.param_groups for p in group["params"]}.values())

    def _in_ball(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in self.ball.of(group))

    def _set_grads(self, grads: Mapping[Tensor, Tensor]) -> None:
        for p in self._params():
            p.grad = grads.get(p)

    @torch.no_grad()
    def _ascend(
        self, grad_scale: float | Tensor = 1.0, cost: float = 1.0, directions: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Move, along the gradients or else the directions, which are consumed."""
        self._begin()
        ascents: dict[Tensor, Ascent] = {}
        for group in self.param_groups:
            epsilon, inner_lr = group["epsilon"], group["inner_lr"]
            check_not_negative(epsilon=epsilon, inner_lr=inner_lr)  # a schedule may have changed them
            for p in self.ball.of(group):
                along = p.grad if directions is None else directions.get(p)
                ascents[p] = Ascent(p, along, -inner_lr if group.get("maximize") else inner_lr, epsilon)
        if any(p.dtype in LOW_PRECISION for p in ascents):
            self._warn_once("AMP on 16-bit weights loses small displacements; use float32 and autocast")
        if directions is None:
            self._warn_without_gradients(ascents)
        if not self._open:
            self._ascents, self._open = 0, True
            self._costs.append(0.0)
        self._perturbation.ascend(ascents.values(), grad_scale)
        self._set_grads({})
        self._ascents += 1
        self._costs[-1] += cost if directions is None else 0.0

    def _warn_without_gradients(self, ball: Iterable[Tensor]) -> None:
        sharded = [p for p in ball if is_distributed(p) and p.requires_grad]
        if sharded and all(p.grad is None for p in sharded):
            raise RuntimeError(
                "a pass left no gradient on the sharded parameters: leave gradient synchronisation on in the ascent"
                " pass, model.set_requires_gradient_sync(True); without it FSDP keeps the gradients to itself"
            )
        if not self.gradients():
            warnings.warn("AMP: a pass left no gradient to ascend along", RuntimeWarning, stacklevel=4)

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

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def _refuse_attached(self) -> None:
        if self.attached:
            raise RuntimeError("the attached module makes the ascent: call backward() and step(), or detach it first")
