"""AMP, Adversarial Model Perturbation, as a `torch.optim.Optimizer` around any base optimizer.

Paper: "Regularizing Neural Networks via Adversarial Model Perturbation", Zheng, Zhang, Mao, CVPR 2021,
https://arxiv.org/abs/2010.04925. For one mini-batch, Algorithm 1 reads::

    delta = 0
    repeat inner_iter times:
        delta = project(delta + inner_lr * gradient at theta + delta)    # onto the ball of radius epsilon
    theta = base_optimizer(theta, gradient at theta + delta)
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_map_only

from amp_plugin.base import OptimizerFactory, check_not_negative, make_base
from amp_plugin.compilation import not_compiled
from amp_plugin.norms import LOW_PRECISION
from amp_plugin.passes import ExtraPasses
from amp_plugin.perturbation import Ascent, Displacement, Norm, Perturbation
from amp_plugin.sharding import is_distributed
from amp_plugin.wrapper import OptimizerWrapper

living: weakref.WeakSet[AMP] = weakref.WeakSet()  # for hosts that know only the module, or only the optimizer


class AMP(OptimizerWrapper):
    """Minimises the worst loss within a small ball around the weights, with any base optimizer.

    Either pass a closure, as the released class wants it (it clears the gradients, computes the loss, calls
    ``backward()`` and returns ``(outputs, loss)`` or the loss)::

        outputs, loss = optimizer.step(closure)

    or drive the two passes yourself::

        loss_fn(model(x), y).backward()  # at theta
        optimizer.ascend()               # to theta + delta; clears the gradients
        loss_fn(model(x), y).backward()  # at theta + delta
        optimizer.step()                 # back to theta, then the base optimizer's step

    or let the module make the passes (:func:`amp_plugin.attach`), in a loop that knows nothing of AMP.

    The groups and the state are the base optimizer's own, so schedulers and checkpoints see one optimizer.
    The step makes no host synchronisation of its own; only whether the ascent gradient was finite travels to
    the host, asynchronously, during the descent pass.

    Args:
        params: parameters, named parameters or parameter groups; a group may set its own ``epsilon`` and
            ``inner_lr`` beside the base optimizer's options. Other keys are kept.
        lr: learning rate of the base optimizer; None for its default.
        epsilon: radius of the ball, in the units of the weights. 0 is exactly the base optimizer.
        inner_lr: step length of the ascent, zeta in the paper: ``delta = inner_lr * gradient``, then clipped.
        inner_iter: number of ascent steps, N in the paper. 0 is exactly the base optimizer.
        base_optimizer: a class, or a name that `torch.optim` (``"AdamW"``) or timm (``"lamb"``) knows.
        norm: ``"tensor"``, a ball for every parameter tensor, as in the released code and so in the published
            tables; or ``"global"``, one ball over all parameters, as in the paper's text.
        momentum: for the base optimizer; None for its default.
        weight_decay: for the base optimizer; None for its default. Acts at theta, never in the ascent.
        nesterov: for the base optimizer; None for its default.
        **kwargs: further arguments of the base optimizer.

    Raises:
        ValueError: a hyper-parameter is out of range, or the base optimizer is unknown or cannot be used.
        TypeError: the base optimizer does not take one of the arguments.
    """

    _ball: ClassVar[type[Perturbation]] = Perturbation
    found_inf: Tensor
    grad_scale: Tensor | None
    _parked: dict[Tensor, Tensor]
    _finished: list[Displacement]
    attached: bool
    in_closure: bool

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
        **kwargs: Any,
    ) -> None:
        check_not_negative(lr=lr, epsilon=epsilon, inner_lr=inner_lr, momentum=momentum, weight_decay=weight_decay)
        if isinstance(inner_iter, bool) or not isinstance(inner_iter, int) or inner_iter < 0:
            raise ValueError(f"inner_iter must be an integer >= 0, got {inner_iter!r}")
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        kwargs = {**{name: value for name, value in given.items() if value is not None}, **kwargs}
        self.inner_iter = inner_iter
        self.skipped_steps = 0
        self._reset(norm)
        super().__init__(make_base(base_optimizer, params, kwargs), {"epsilon": epsilon, "inner_lr": inner_lr})

    @property
    def norm(self) -> Norm:
        """Which ball: ``"tensor"`` or ``"global"``."""
        return self._perturbation.norm

    @property
    def perturbs(self) -> bool:
        """Whether the hyper-parameters ask for any perturbation at all; if not, AMP is its base optimizer."""
        return self.inner_iter > 0 and any(g["epsilon"] > 0 and g["inner_lr"] > 0 for g in self.param_groups)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at theta + delta now, rather than at theta."""
        return self._perturbation.active

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a gradient scaler calls step() even after an overflow, with `found_inf` and `grad_scale` set.

        It has to where the weights are displaced, or they would stay so, and where a closure is to be refused.
        Elsewhere it skips the step itself, as hosts expect: accelerate then leaves the schedule where it is.
        """
        return self._open or not (self._ascents or self._finished)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set ``epsilon`` and ``inner_lr`` beside the base optimizer's options."""
        check_not_negative(**{k: param_group[k] for k in ("lr", "epsilon", "inner_lr") if k in param_group})
        super().add_param_group(param_group)

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, passes: ExtraPasses | None = None) -> Any:
        """One AMP step.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss or
                ``(outputs, loss)``. Called ``inner_iter + 1`` times. Gradients accumulated before the call are
                kept out of the ascent and given back for the descent, unless the closure clears them. None:
                :meth:`ascend` must have been called ``inner_iter`` times since the last step. With an attached
                module, which makes the passes itself, a closure is called once.
            passes: what the additional calls must leave alone; None: as in the released code, BatchNorm
                statistics are updated and dropout masks drawn in every call.

        Returns:
            What the first call of the closure, at the unperturbed weights, returned, detached.

        Raises:
            RuntimeError: no closure and no ascent, or gradients are sparse. Whatever is raised, the weights
                are the unperturbed ones.
        """
        if closure is None or self.attached:
            result = self._evaluate_once(closure) if closure else None
            try:
                self._require_ascents()
            finally:
                self.restore()
            self._descend()
            return tree_map_only(Tensor, Tensor.detach, result)
        if self._open:
            self.restore()
            raise RuntimeError("step(closure) after ascend(): call step() without a closure; the ascent was dropped")
        self._refuse_scaled_closure()
        evaluate = torch.enable_grad()(closure)
        ascents = self.inner_iter if self.perturbs else 0
        if ascents:
            self._parked = {p: p.grad for p in self._params() if p.grad is not None}
            self._set_grads({})
        self.in_closure = True
        try:
            with passes.clean() if passes else nullcontext():
                result = evaluate()
            for i in range(ascents):
                self._ascend()
                if i + 1 == ascents:
                    self._set_grads(self._parked)
                with passes.extra() if passes else nullcontext():
                    evaluate()
            self.restore()
        except BaseException:
            self.restore()
            self._ascents = 0
            self._set_grads({})
            raise
        finally:
            self._parked = {}
            self.in_closure = False
        self._descend()
        return tree_map_only(Tensor, Tensor.detach, result)

    @torch.no_grad()
    def ascend(self, *, grad_scale: float | Tensor = 1.0) -> None:
        """Take one ascent step along ``.grad`` and clear the gradients; the weights are now at theta + delta.

        To be called ``inner_iter`` times before :meth:`step`, each time after a backward pass. With a gradient scaler
        call :meth:`pass_on_overflow` before :meth:`step`. Under DDP, if the backward pass was in ``no_sync()``, so that
        each process perturbs along its own gradient, first call ``amp_plugin.distributed.share_overflow(parameters)``
        (also in a closure): else a process whose gradient is not finite would skip the step alone.

        Args:
            grad_scale: what the loss was multiplied by (a gradient scaler's scale); divided out here, since
                AMP, unlike SAM, does not normalise the gradient.

        Raises:
            RuntimeError: no parameter has a gradient, or one is sparse; or an attached module makes the ascent.
        """
        if self.attached:
            raise RuntimeError("the attached module makes the ascent: call backward() and step(), or detach it first")
        if not self.gradients():
            raise RuntimeError(
                "ascend() found no gradient: call backward() on the loss at the current weights first; under FSDP with"
                " gradient synchronisation on, model.set_requires_gradient_sync(True)"
            )
        try:
            self._ascend(grad_scale)
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

    @torch.no_grad()
    def pass_on_overflow(self) -> None:
        """Tell a gradient scaler of an ascent that was not finite: a gradient of the descent becomes infinite.

        To be called after the last backward pass, before the scaler's ``unscale_`` or ``step``. The scaler then skips
        the step and lowers its scale. Without this call the step is skipped all the same, but the scale stays.
        """
        if self._ascents and not self.ascent_was_finite():
            for grad in self.gradients()[:1]:
                grad.fill_(torch.inf)

    def ascent_was_finite(self) -> bool:
        """Whether the last ascent's gradients were all finite; waits for the device if that is not known yet."""
        return self._perturbation.was_finite()

    def statistics(self) -> dict[str, Tensor]:
        """Measures of the last ascent, see :meth:`Perturbation.statistics`; nothing is synchronised."""
        return self._perturbation.statistics()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, including those that :meth:`step` keeps aside for the descent."""
        self._parked = {}
        self._finished = []
        if not self._open:
            self._ascents = 0  # the gradient of the descent is gone
        super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        self._require_clean("copy or pickle AMP")
        own = {"inner_iter": self.inner_iter, "norm": self.norm, "skipped_steps": self.skipped_steps}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "norm" in state:  # from a copy or a pickle
            self._reset(state.pop("norm"))
        else:
            self._require_clean("load a state")
        super().__setstate__(state)

    def __repr__(self) -> str:
        head = f"{type(self).__name__}({type(self.base_optimizer).__name__}, norm={self.norm!r}"
        return super().__repr__().replace(type(self).__name__, f"{head}, inner_iter={self.inner_iter})", 1)

    def _reset(self, norm: Norm) -> None:
        """State that lives within one step only and is never saved."""
        living.add(self)
        self._perturbation = self._ball(norm)
        self._ascents = 0  # since the last step
        self._open = False  # between the first ascend() and restore() or step()
        self._parked = {}  # gradients from before step(closure)
        self._finished = []  # where an attached module took the gradients that are there
        self.attached = False  # by attach()
        self.in_closure = False  # during step(closure)
        self._warned_low_precision = False

    def _require_clean(self, action: str) -> None:
        if self.perturbed:
            raise RuntimeError(f"cannot {action} while the weights are perturbed; call restore() first")

    def _params(self) -> Iterator[Tensor]:
        # A tensor listed twice is one weight, to be displaced once; torch hashes tensors in Python, ten times slower.
        return iter({id(p): p for group in self.param_groups for p in group["params"]}.values())

    def _set_grads(self, grads: dict[Tensor, Tensor]) -> None:
        for p in self._params():
            p.grad = grads.get(p)

    def _ascend(self, grad_scale: float | Tensor = 1.0) -> None:
        ascents: dict[Tensor, Ascent] = {}
        for group in self.param_groups:
            epsilon, inner_lr = group["epsilon"], group["inner_lr"]
            check_not_negative(epsilon=epsilon, inner_lr=inner_lr)  # a schedule may have changed them
            if not (epsilon and inner_lr):
                continue
            for p in group["params"]:
                ascents[p] = Ascent(p, p.grad, -inner_lr if group.get("maximize") else inner_lr, epsilon)
        if not self._warned_low_precision and any(p.dtype in LOW_PRECISION for p in ascents):
            self._warned_low_precision = True
            warnings.warn("AMP on 16-bit weights loses small displacements; use float32 and autocast", stacklevel=2)
        sharded = [p for p in ascents if is_distributed(p) and p.requires_grad]
        if sharded and all(p.grad is None for p in sharded):
            raise RuntimeError(
                "a pass left no gradient on the sharded parameters: leave gradient synchronisation on in the ascent"
                " pass, model.set_requires_gradient_sync(True); without it FSDP keeps the gradients to itself"
            )
        if not self.gradients():
            warnings.warn("AMP: a pass left no gradient to ascend along", RuntimeWarning, stacklevel=3)
        if not self._open:
            self._ascents, self._open = 0, True
        self._perturbation.ascend(ascents.values(), grad_scale)
        self._set_grads({})
        self._ascents += 1

    def _evaluate_once(self, closure: Callable[[], Any]) -> Any:
        self._refuse_scaled_closure()
        return torch.enable_grad()(closure)()

    def _refuse_scaled_closure(self) -> None:
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "a gradient scaler cannot drive step(closure), because the closure's gradients carry the loss scale;"
                " use backward(), ascend(grad_scale=scaler.get_scale()), backward(), scaler.step(optimizer), or"
                " bfloat16, which needs no scaler"
            )

    def _require_ascents(self) -> None:
        """Refuse to train without the perturbation while claiming to train with it."""
        if not self.perturbs or self._ascents == self.inner_iter or self._finished:
            return
        if not self._ascents and all(float(g["lr"]) == 0.0 for g in self.param_groups):
            return  # harmless, and how torch.distributed.checkpoint makes an optimizer build its state
        raise RuntimeError(
            f"AMP.step() without a closure needs {self.inner_iter} ascent step(s) before it, got {self._ascents}; it"
            " would train without the perturbation that you asked for. Use one of: optimizer.step(closure);"
            " loss.backward(), optimizer.ascend(), loss.backward(), optimizer.step(); amp_plugin.attach(optimizer,"
            " module) with a module that returns its loss; or amp_plugin.AMPTrainer."
            " (After an interrupted step, optimizer.restore() starts afresh.)"
        )

    def _descend(self) -> None:
        """The base optimizer's step at theta, unless the ascent was not finite."""
        if self._perturbation.disturbed:
            self._perturbation.disturbed = False
            raise RuntimeError(
                "a gradient hook changed the weights while they were perturbed, and the change was undone: an optimizer"
                " that steps inside the backward pass cannot be used with AMP; let AMP's base_optimizer make the step"
            )
        finished, self._finished = self._finished, []
        ascended, self._ascents = self._ascents > 0, 0
        if hasattr(self, "found_inf"):  # set by a gradient scaler for this call
            if self.found_inf.item():
                return  # the scaler will lower its scale
            if self.grad_scale is not None:  # not unscaled yet
                torch._foreach_div_(self.gradients(), self.grad_scale.item())
        if (ascended and not self.ascent_was_finite()) or not all(d.was_finite() for d in finished):
            self.skipped_steps += 1
            warnings.warn(
                "AMP: the ascent gradient had NaN or infinite entries; the step was skipped and the weights left as"
                f" they were ({self.skipped_steps} so far)",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        self.base_optimizer.step()


def find_amp(optimizer: Any) -> AMP | None:
    """The AMP optimizer in whatever accelerate (``.optimizer``) or timm's Lookahead wrapped around it, or None."""
    while optimizer is not None and not isinstance(optimizer, AMP):
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_base_optimizer", None)
    return optimizer
