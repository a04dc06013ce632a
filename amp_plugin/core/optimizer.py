"""AMP, Adversarial Model Perturbation, as a `torch.optim.Optimizer` around any base optimizer.

Paper: "Regularizing Neural Networks via Adversarial Model Perturbation", Zheng, Zhang, Mao, CVPR 2021,
https://arxiv.org/abs/2010.04925. For one mini-batch, Algorithm 1 reads::

    delta = 0
    repeat inner_iter times:
        delta = project(delta + inner_lr * gradient at theta + delta)    # onto the ball of radius epsilon
    theta = base_optimizer(theta, gradient at theta + delta)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_map_only

from amp_plugin.core import closure_passes, complaints, explicit_passes, grad_scaler
from amp_plugin.core.base_optimizer import OptimizerFactory, make_base
from amp_plugin.core.checks import check_count, check_not_negative
from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.delta_check import DeltaCheck
from amp_plugin.core.deprecation import Renamed
from amp_plugin.core.explicit_passes import Batches, Scale
from amp_plugin.core.fused import step_where_finite
from amp_plugin.core.other_gradients import OthersCheck
from amp_plugin.core.perturbation import Norm, Perturbation
from amp_plugin.core.policies import AscentPolicy, BatchParts, make_policy
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.core.selection import Parameters, ParameterSelection
from amp_plugin.core.step import Step
from amp_plugin.core.wrapper import OptimizerWrapper

_instances: weakref.WeakSet[AMP] = weakref.WeakSet()  # for doors that know only the module, or only the optimizer


class AMP(OptimizerWrapper):
    """An optimizer that minimises the worst loss within a small ball around the weights.

    A closure makes the passes of a step, as the released class wants it, ``optimizer.step(closure)``; or a module
    makes them (:func:`amp_plugin.attach`), in a loop that knows nothing of AMP; or the loop makes them::

        for _ in optimizer.ascent_passes():
            loss_fn(model(x), y).backward()  # at theta; then the weights move to theta + delta
        loss_fn(model(x), y).backward()      # at theta + delta
        optimizer.step()                     # back to theta, then the base optimizer's step

    Groups and state are the base optimizer's own, so schedules and checkpoints see one optimizer. A step never waits
    for the device: whether the ascent was finite travels to the host during the descent's pass.

    Args:
        params: parameters, named parameters or parameter groups; a group may set its own ``epsilon`` and ``inner_lr``
            beside the base optimizer's options. Other keys are kept.
        lr: learning rate of the base optimizer; default None, the base optimizer's own.
        epsilon: radius of the ball, in the units of the weights; default 0.5. With 0 AMP is its base optimizer.
        inner_lr: step length of the ascent, zeta in the paper; default 1.
        inner_iter: number of ascent steps, N in the paper; default 1. With 0 AMP is its base optimizer.
        base_optimizer: class, or name that `torch.optim` (``"AdamW"``) or timm (``"lamb"``) knows; default SGD.
        norm: ``"tensor"`` (default) for a ball around every parameter tensor, as in the released code and so in the
            published tables; ``"global"`` for one ball over all parameters, as in the paper's text.
        momentum: option of the base optimizer; default None, the base optimizer's own. So are the next two.
        weight_decay: option of the base optimizer, which acts at theta, never in the ascent.
        nesterov: option of the base optimizer.
        ascent: steps that ascend, and what they ascend on and along, to spend fewer passes: ``"full"`` (default, the
            paper), ``"subset(0.5)"``, ``"split(0.25)"``, ``"every(2)"``, ``"window(0.5, 1.0)"``, ``"stale"``,
            ``"momentum"``, ``"adaptive(0.0)"``, or several, ``"every(2), subset(0.5)"``; see
            :mod:`amp_plugin.core.policies`.
        parameters: choice of what is perturbed: ``"norm"`` for the weight and bias of normalisation layers, another
            string for a regular expression to be found in the names (see :meth:`name_parameters`), or a function of
            name and parameter; default None, all parameters.
        capturable: whether the host reads nothing in a step, so that a CUDA graph can hold one
            (:class:`amp_plugin.CapturedStep`), and the base optimizer's fused kernel skips what was not finite, without
            a warning; default False. Needs ``fused=True`` and a policy whose steps are all alike (``"full"``,
            ``"subset(0.25)"``, ``"split(0.25)"``).
        **kwargs: further arguments of the base optimizer.

    Attributes:
        policy: what ``ascent`` asks for, an :class:`~amp_plugin.core.policies.AscentPolicy`.
        total_steps: number of steps of the training, for policies in fractions of it; None until a host sets it.
        attached: whether :func:`amp_plugin.attach` has attached the optimizer to a module.
        perturbation: the ball, which moves the weights and puts them back.
        progress: how far the training step has come.

    Raises:
        ValueError: a hyper-parameter is out of range, or the base optimizer is unknown or cannot be used.
        TypeError: the base optimizer does not take one of the arguments.
    """

    _perturbation_class: ClassVar[type[Perturbation]] = Perturbation
    _copied = (*OptimizerWrapper._copied, "inner_iter", "norm", "capturable", "policy", "selection", "total_steps")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        epsilon: float = 0.5,
        inner_lr: float = 1.0,
        inner_iter: int = 1,
        base_optimizer: str | OptimizerFactory = SGD,
        norm: Norm = "tensor",
        *,
        momentum: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        ascent: str | AscentPolicy = "full",
        parameters: Parameters | None = None,
        capturable: bool = False,
        **kwargs: Any,
    ) -> None:
        check_not_negative(lr=lr, epsilon=epsilon, inner_lr=inner_lr, momentum=momentum, weight_decay=weight_decay)
        check_count(inner_iter=inner_iter)
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        kwargs = {**{name: value for name, value in given.items() if value is not None}, **kwargs}
        base = make_base(base_optimizer, params, kwargs, capturable=capturable)
        self.inner_iter, self.norm, self.capturable = inner_iter, norm, capturable
        self.policy = make_policy(ascent)
        self.policy.check(inner_iter=inner_iter, capturable=capturable)
        self.selection = ParameterSelection(parameters)
        self.total_steps: int | None = None
        self._start()
        super().__init__(base, {"epsilon": epsilon, "inner_lr": inner_lr, **self.policy.state})
        self.selection.choose_anew(self.param_groups)

    def _start(self) -> None:
        """Make what is never copied or saved."""
        self.perturbation = self._perturbation_class(self.norm, tell_host=not self.capturable)
        self.progress, self._last_passes = Step(), 1.0
        self.delta_check, self.others_check, self.attached = DeltaCheck(), OthersCheck(), False
        self._skipped: int | Tensor = 0
        _instances.add(self)

    # --- one step

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, passes: ExtraPasses | None = None) -> Any:
        """Make one AMP step.

        Args:
            closure: function that clears the gradients, computes the loss, calls ``backward()`` and returns the loss
                or ``(outputs, loss)``. It is called before each ascent that needs a gradient, and once more for the
                descent; only once where an attached module makes the passes. Gradients from before the call are set
                aside in the ascent and put back for the descent, unless the closure clears them. Default None: the
                loop has made the passes already, by :meth:`ascent_passes`, :meth:`ascend` or an attached module.
            passes: :class:`amp_plugin.ExtraPasses` that every call runs under; default None, no replay, as in the
                released code.

        Returns:
            What the first call of the closure returned, detached. That call is at theta, unless the policy needs none.

        Raises:
            RuntimeError: no ascent was made, or a gradient is sparse. Whatever is raised, the weights are at theta.
            ValueError: the policy needs the batch, which a closure keeps to itself.
        """
        trains = True
        if closure is not None:
            grad_scaler.check_closure(self)
            closure = torch.enable_grad()(closure)
        if closure is not None and not self.attached:
            result = self._passes_by_closure(closure, passes)
        else:  # the attached module makes the passes, in this closure or before; or the loop has made them
            result = closure() if closure is not None else None
            try:  # before restore(), which may forget the ascents
                trains = self._check_ascents()
            finally:
                self.restore()
        self._descend(trains)
        return tree_map_only(Tensor, Tensor.detach, result)

    _passes_by_closure = closure_passes.passes_by_closure

    def passes_of_step(
        self, batches: Batches, grad_scale: Scale = 1.0, *, prune: bool = True, passes: ExtraPasses | None = None
    ) -> Iterator[Sequence[Any]]:
        """Yield the micro-batches that each ascent pass has to run, under its guard; move the weights after each pass.

        This is :meth:`ascent_passes` for doors, which restore after an error by themselves. With ``prune`` parameters
        outside the ball require no gradient in these passes; DDP must not wait for one then.
        """
        self.progress.begun, self.progress.rest = True, None
        if not (self.ascends and complaints.may_perturb(self)):
            self.progress.plain = True
        elif not self.policy.cost:  # the direction is known without a pass
            ball = self.selection.within(self.param_groups)
            self._ascend(directions=self.policy.directions(self.base_optimizer, ball))
        else:
            part, share, self.progress.rest = BatchParts(*self.policy.select_batches(batches))
            splits = self.progress.rest is not None
            for k in range(self.inner_iter):
                own = self._params()
                guard = passes.ascent(k, own, splits=splits) if passes else self.others_check.ascent(own)
                with guard, self.selection.pruned(self.param_groups if prune else []) as outside:
                    yield part
                if outside:  # reentrant checkpointing may have dropped gradients in the ball with theirs
                    self.progress.unreached = [p for p in self.selection.within(self.param_groups) if p.grad is None]
                self._ascend(grad_scale, 0.0 if splits and k == 0 else share)  # the descent is spared it

    @torch.no_grad()
    def _ascend(
        self, grad_scale: Scale = 1.0, cost: float = 1.0, directions: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Move along the gradients, or the directions if there are any, and overwrite them; clear the gradients."""
        ascents, step = self.selection.ascents(self.param_groups, directions), self.progress
        complaints.check_ball(self, ascents, along_gradients=directions is None)
        step.begun = True
        if not step.moved:  # the first ascent from theta
            step.ascents, step.moved = 0, True
            step.costs.append(0.0)
        if directions is None and not self.capturable:
            self.delta_check.ascend(ascents)
        self.perturbation.ascend(ascents, grad_scale)
        self._set_gradients({})
        step.ascents += 1
        step.costs[-1] += cost if directions is None else 0.0

    def _check_ascents(self) -> bool:
        """Raise RuntimeError if the step would train without the perturbation; return False if it trains nothing."""
        idle = not (self.progress.ascents or self.progress.descents)
        if self.ascends and not (idle and all(g.get("lr") == 0 for g in self.param_groups)):
            complaints.check_ascents(self, self.progress)
        # torch.distributed.checkpoint steps without a learning rate, so that the optimizer builds its state.
        return not (self.ascends and idle)

    def restore(self) -> None:
        """Put back the exact bits of theta; forget the ascents, unless a gradient was taken at theta + delta."""
        self.perturbation.restore()
        self.progress.moved = False
        if self.attached or not self.has_gradients():
            self.progress.ascents = 0  # so that step() takes no other gradient for one of theta + delta

    def _descend(self, trains: bool) -> None:
        """Let the base optimizer step at theta, unless an ascent was not finite; tell the policy if the step trains."""
        step = self.end_step()
        complaints.check_step(self, step)
        if self.capturable:
            flags = [d.finite for d in step.descents] + ([self.perturbation.finite] if step.ascents else [])
            skipped = step_where_finite(self.base_optimizer, [flag for flag in flags if flag is not None], self)
            self._skipped = skipped + self._skipped if isinstance(self._skipped, int) else self._skipped.add_(skipped)
        elif grad_scaler.found_overflow(self, self.gradients):
            pass  # no step and no warning: the scaler knows, and will lower its scale
        elif (step.ascents and not self.perturbation.was_finite()) or not step.were_finite(self.gradients):
            self._skipped += 1
            complaints.tell_of_skipped_step(self)
        else:
            ball = self.selection.within(self.param_groups)
            with self.policy.around_step(self.base_optimizer, ball) if trains else nullcontext():
                self.base_optimizer.step()

    def end_step(self) -> Step:
        """Begin a new step; return the one that is over."""
        step, self.progress = self.progress, Step(unread=self.progress.factors)
        self._last_passes = step.passes
        return step

    # --- questions

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
        return self.perturbation.active

    @property
    def passes(self) -> float:
        """Passes over the batch (an ascent on a part of it is that part) of the step under way, or of the last step."""
        return self.progress.passes if self.progress.begun else self._last_passes

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because an ascent was not finite; waits for the device if `capturable`."""
        return int(self._skipped)

    def statistics(self) -> dict[str, Tensor]:
        """Return measures of the last ascent, see :meth:`Perturbation.statistics`; nothing is synchronised."""
        return self.perturbation.statistics()

    # --- for loops that make the passes themselves, and for gradient scalers

    ascent_passes = explicit_passes.ascent_passes
    descent_batches = explicit_passes.descent_batches
    ascend = explicit_passes.ascend
    pass_on_overflow = Renamed("propagate_overflow")

    @torch.no_grad()
    def propagate_overflow(self) -> None:
        """Tell a gradient scaler of an ascent that was not finite, by an infinite gradient of the descent.

        Call it after the last backward pass, before the scaler's ``unscale_`` or ``step``; else the scale stays.
        """
        if self.progress.ascents:
            grad_scaler.spoil(self.gradients(), self.perturbation, on_device=self.capturable)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # a gradient scaler asks
        return grad_scaler.takes_overflowed_steps(self.progress, capturable=self.capturable)

    # --- groups and state

    def name_parameters(self, named: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Tell the names that ``parameters=`` chooses from; ValueError if no parameter is chosen.

        Only a closure or a loop of one's own needs this, where the optimizer was made of parameters without names.
        `named` is a module, or its ``named_parameters()``.
        """
        named = named.named_parameters() if isinstance(named, nn.Module) else named
        self.selection.choose(self.param_groups, named)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set ``epsilon`` and ``inner_lr`` beside the base optimizer's options."""
        check_not_negative(**{k: param_group[k] for k in ("lr", "epsilon", "inner_lr") if k in param_group})
        super().add_param_group(param_group)
        self.selection.choose_anew(self.param_groups)

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, also those that :meth:`step` keeps aside for the descent."""
        self.progress.drop_gradients()
        super().zero_grad(set_to_none)

    def eval(self) -> None:
        """Put a base optimizer with modes into that of evaluation; RuntimeError while the weights are perturbed."""
        self._check_clean("leave the training's mode")
        super().eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state; what the policy has to remember is in its groups and state."""
        self.policy.flush(self.base_optimizer)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of AMP or of the base optimizer alone; RuntimeError while the weights are perturbed."""
        self._check_clean("load a state")
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        self.policy.reset()
        complaints.tell_of_loaded_options(self, before, state_dict["param_groups"])

    def __getstate__(self) -> dict[str, Any]:
        self._check_clean("copy or pickle AMP")
        self.policy.flush(self.base_optimizer)
        return {**super().__getstate__(), "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.norm, self.capturable = state["norm"], state["capturable"]
        self._start()
        super().__setstate__(state)

    def __repr__(self) -> str:
        name, base = type(self).__name__, type(self.base_optimizer).__name__
        ascent = "" if self.policy.name == "full" else f", ascent={str(self.policy)!r}"
        chosen = "" if self.selection.parameters is None else f", parameters={self.selection.parameters!r}"
        head = f"{name}({base}, norm={self.norm!r}, inner_iter={self.inner_iter}{ascent}{chosen})"
        return super().__repr__().replace(name, head, 1)

    def _check_clean(self, action: str) -> None:
        if self.perturbed:
            raise RuntimeError(f"cannot {action} while the weights are perturbed; call restore() first")
