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
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_map_only

from amp_plugin.core.base_optimizer import OptimizerFactory, check_not_negative, make_base
from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.descending import Descending
from amp_plugin.core.distributed import in_process_group
from amp_plugin.core.perturbation import Norm
from amp_plugin.core.policies import AscentPolicy, Parameters
from amp_plugin.core.replay import ExtraPasses

_OF_ASCENT = ("policy", "ball", "total_steps")
living: weakref.WeakSet[AMP] = weakref.WeakSet()  # for hosts that know only the module, or only the optimizer


class AMP(Descending):
    """Minimises the worst loss within a small ball around the weights, with any base optimizer.

    Either pass a closure, as the released class wants it (it clears the gradients, computes the loss, calls
    ``backward()`` and returns ``(outputs, loss)`` or the loss)::

        outputs, loss = optimizer.step(closure)

    or drive the two passes yourself::

        loss_fn(model(x), y).backward()  # at theta
        optimizer.ascend()               # to theta + delta; clears the gradients
        loss_fn(model(x), y).backward()  # at theta + delta
        optimizer.step()                 # back to theta, then the base optimizer's step

    (the first two lines in a loop, ``for _ in optimizer.ascent_passes(): loss_fn(model(x), y).backward()``, are right
    for every ``inner_iter`` and ``ascent``)
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
        ascent: which steps ascend, and along what, to spend less than ``inner_iter + 1`` passes on each: ``"full"``
            (the paper), ``"subset(0.5)"``, ``"every(2)"``, ``"window(0.5, 1.0)"``, ``"stale"``, ``"momentum"``,
            ``"adaptive(0.0)"``, or several, ``"every(2), subset(0.5)"``; see :mod:`amp_plugin.core.policies`.
        parameters: which parameters the ball is for: ``"norm"``, the weight and bias of normalisation layers; another
            string, a regular expression to be found in their names; or a function of name and parameter. None for
            all. Names are those of named parameters, or of the module; see :meth:`name_parameters`.
        capturable: the host reads nothing in a step, so that a whole one fits into a CUDA graph
            (:class:`amp_plugin.CapturedStep`): what was not finite is skipped by the base optimizer's fused kernel,
            without a warning; :attr:`skipped_steps` counts it. Needs ``fused=True`` and ``ascent="full"``.
        **kwargs: further arguments of the base optimizer.

    Attributes:
        policy: what ``ascent`` asks for.
        total_steps: of the training; a policy in fractions of it needs to know. Hosts that do know set it.
        skipped_steps: how many were left out, because an ascent was not finite.

    Raises:
        ValueError: a hyper-parameter is out of range, or the base optimizer is unknown or cannot be used.
        TypeError: the base optimizer does not take one of the arguments.
    """

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
        ascent: str | AscentPolicy = "full",
        parameters: Parameters | None = None,
        capturable: bool = False,
        **kwargs: Any,
    ) -> None:
        check_not_negative(lr=lr, epsilon=epsilon, inner_lr=inner_lr, momentum=momentum, weight_decay=weight_decay)
        if isinstance(inner_iter, bool) or not isinstance(inner_iter, int) or inner_iter < 0:
            raise ValueError(f"inner_iter must be an integer >= 0, got {inner_iter!r}")
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        kwargs = {**{name: value for name, value in given.items() if value is not None}, **kwargs}
        super().__init__(
            make_base(base_optimizer, params, kwargs, capturable=capturable),
            epsilon=epsilon,
            inner_lr=inner_lr,
            inner_iter=inner_iter,
            norm=norm,
            ascent=ascent,
            parameters=parameters,
            capturable=capturable,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set ``epsilon`` and ``inner_lr`` beside the base optimizer's options."""
        check_not_negative(**{k: param_group[k] for k in ("lr", "epsilon", "inner_lr") if k in param_group})
        super().add_param_group(param_group)
        self.ball.choose_anew(self.param_groups)

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, passes: ExtraPasses | None = None) -> Any:
        """One AMP step.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss or
                ``(outputs, loss)``. Called ``inner_iter + 1`` times in a step that ascends with passes of its own,
                else once. Gradients accumulated before the call are kept out of the ascent and given back for the
                descent, unless the closure clears them. None: the passes of :meth:`ascent_passes` must have been
                made since the last step, or :meth:`ascend` called ``inner_iter`` times, unless the policy asks for
                none. With an attached module, which makes the passes itself, a closure is called once.
            passes: what the additional calls must leave alone; None: as in the released code, BatchNorm
                statistics are updated and dropout masks drawn in every call.

        Returns:
            What the first call of the closure returned, detached: at the unperturbed weights, unless the policy
            ascends without a pass there.

        Raises:
            RuntimeError: no closure and no ascent, or gradients are sparse. Whatever is raised, the weights
                are the unperturbed ones.
            ValueError: the policy needs the batch, which a closure keeps to itself.
        """
        if closure is None or self.attached:
            result = self._evaluate_once(closure) if closure else None
            try:
                counts = self._require_ascents()
            finally:
                self.restore()
            self._descend(counts)
            return tree_map_only(Tensor, Tensor.detach, result)
        if self._open:
            self.restore()
            raise RuntimeError("step(closure) after ascend(): call step() without a closure; the ascent was dropped")
        self._refuse_scaled_closure()
        evaluate = torch.enable_grad()(closure)
        results: list[Any] = []

        def make_pass() -> None:
            with passes.number(len(results)) if passes else nullcontext():
                results.append(evaluate())

        ascends = self.ascends
        if ascends:
            self._parked = {p: p.grad for p in self._params() if p.grad is not None}
            self._set_grads({})
        self.in_closure = True
        try:
            for _ in self.passes_of_step(None, prune=not in_process_group()):
                make_pass()
            if ascends:
                self._set_grads(self._parked)
            make_pass()
            self.restore()
        except BaseException:
            self.restore()
            self._ascents = 0
            self._set_grads({})
            self._stepped = True
            raise
        finally:
            self._parked = {}
            self.in_closure = False
        self._descend()
        return tree_map_only(Tensor, Tensor.detach, results[0])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, including those that :meth:`step` keeps aside for the descent."""
        self._parked = {}
        self._finished = []
        if not self._open:
            self._ascents = 0  # the gradient of the descent is gone
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's; what the ascent policy has to remember is in its groups and state."""
        self.policy.settle(self.base_optimizer)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base optimizer loads it, whose own checkpoint it may be.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._require_clean("load a state")
        super().load_state_dict(state_dict)
        self.policy.forget()

    def __getstate__(self) -> dict[str, Any]:
        self._require_clean("copy or pickle AMP")
        self.policy.settle(self.base_optimizer)
        own = {name: getattr(self, name) for name in ("inner_iter", "norm", "capturable", *_OF_ASCENT)}
        return {**super().__getstate__(), **own, "_skipped": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset(state.pop("norm"), state.pop("capturable"))
        super().__setstate__(state)

    def __repr__(self) -> str:
        head = f"{type(self).__name__}({type(self.base_optimizer).__name__}, norm={self.norm!r}"
        head += f", inner_iter={self.inner_iter}"
        if self.policy.name != "full":
            head += f", ascent={str(self.policy)!r}"
        if self.ball.parameters is not None:
            head += f", parameters={self.ball.parameters!r}"
        return super().__repr__().replace(type(self).__name__, f"{head})", 1)

    def _reset(self, norm: Norm, capturable: bool) -> None:
        super()._reset(norm, capturable)
        living.add(self)
        self.in_closure = False  # during step(closure)

    def _evaluate_once(self, closure: Callable[[], Any]) -> Any:
        self._refuse_scaled_closure()
        return torch.enable_grad()(closure)()


def find_amp(optimizer: Any) -> AMP | None:
    """The AMP optimizer in whatever accelerate (``.optimizer``) or timm's Lookahead wrapped around it, or None."""
    while optimizer is not None and not isinstance(optimizer, AMP):
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_base_optimizer", None)
    return optimizer
