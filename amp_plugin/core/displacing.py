"""The way there and back: an optimizer that can put its weights at theta + delta, and at the bits of theta again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amp_plugin.core.base_optimizer import check_not_negative
from amp_plugin.core.norms import LOW_PRECISION
from amp_plugin.core.perturbation import Ascent, Displacement, Norm, Perturbation
from amp_plugin.core.policies import Parameters
from amp_plugin.core.selection import Ball
from amp_plugin.core.sharding import is_distributed
from amp_plugin.core.wrapper import OptimizerWrapper


class Displacing(OptimizerWrapper):
    """The part of :class:`amp_plugin.AMP` that moves the weights; when and along what, others decide."""

    _perturbation_class: ClassVar[type[Perturbation]] = Perturbation
    attached: bool
    _parked: dict[Tensor, Tensor]
    _finished: list[Displacement]

    def __init__(
        self,
        base: Optimizer,
        options: dict[str, object],
        *,
        norm: Norm,
        parameters: Parameters | None,
        capturable: bool,
    ) -> None:
        self.ball = Ball(parameters)
        self._reset(norm, capturable)
        super().__init__(base, options)
        self.ball.choose_anew(self.param_groups)

    @property
    def norm(self) -> Norm:
        """Which ball: ``"tensor"`` or ``"global"``."""
        return self._perturbation.norm

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at theta + delta now, rather than at theta."""
        return self._perturbation.active

    def eval(self) -> None:
        """For a base optimizer with modes: the evaluation's; RuntimeError while the weights are perturbed."""
        self._require_clean("leave the training's mode")
        super().eval()

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
        self._open = False  # between the first ascent and restore() or step()
        self._parked = {}  # gradients from before step(closure)
        self._finished = []  # where an attached module took the gradients that are there
        self.attached = False  # by attach()
        self._warned: set[str] = set()

    def _require_clean(self, action: str) -> None:
        if self.perturbed:
            raise RuntimeError(f"cannot {action} while the weights are perturbed; call restore() first")

    def _params(self) -> Iterator[Tensor]:
        # A tensor listed twice is one weight, to be displaced once; torch hashes tensors in Python, ten times slower.
        return iter({id(p): p for group in self.param_groups for p in group["params"]}.values())

    def _in_ball(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in self.ball.of(group))

    def _set_grads(self, grads: Mapping[Tensor, Tensor]) -> None:
        for p in self._params():
            p.grad = grads.get(p)

    @torch.no_grad()
    def _displace(self, grad_scale: float | Tensor, directions: Mapping[Tensor, Tensor] | None) -> None:
        """Move, along the gradients or else the directions, which are consumed; clear the gradients."""
        ascents: dict[Tensor, Ascent] = {}
        for group in self.param_groups:
            epsilon, inner_lr = group["epsilon"], group["inner_lr"]
            check_not_negative(epsilon=epsilon, inner_lr=inner_lr)  # a schedule may have changed them
            for p in self.ball.of(group):
                along = p.grad if directions is None else directions.get(p)
                ascents[p] = Ascent(p, along, -inner_lr if group.get("maximize") else inner_lr, epsilon)
        if any(p.dtype in LOW_PRECISION for p in ascents):
            self._warn_once("AMP on 16-bit weights loses small displacements; use float32 and autocast")
        if not ascents:
            self.ball.require_chosen(self.param_groups)
        if directions is None:
            self._warn_without_gradients(ascents)
        if not self._open:
            self._ascents, self._open = 0, True
        self._perturbation.ascend(ascents.values(), grad_scale)
        self._set_grads({})
        self._ascents += 1

    def _warn_without_gradients(self, ball: Mapping[Tensor, Ascent]) -> None:
        sharded = [p for p in ball if is_distributed(p) and p.requires_grad]
        if sharded and all(p.grad is None for p in sharded):
            raise RuntimeError(
                "a pass left no gradient on the sharded parameters: leave gradient synchronisation on in the ascent"
                " pass, model.set_requires_gradient_sync(True); without it FSDP keeps the gradients to itself"
            )
        if ball and all(p.grad is None for p in ball):
            warnings.warn("AMP: a pass left no gradient to ascend along", RuntimeWarning, stacklevel=5)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=5)
