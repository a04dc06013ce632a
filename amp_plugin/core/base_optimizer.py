"""The base optimizer that AMP drives: a class, or a name that `torch.optim` or timm's registry knows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from amp_plugin.core.fused import check_fused
from amp_plugin.suggest import did_you_mean

OptimizerFactory = Callable[..., Optimizer]


def make_base(
    base_optimizer: str | OptimizerFactory, params: ParamsT, kwargs: dict[str, Any], *, capturable: bool = False
) -> Optimizer:
    """Build the base optimizer.

    A timm name comes with timm's defaults and timm's rule for ``momentum``: 0.9 unless given, and only for the
    optimizers that have one.

    Args:
        base_optimizer: class, or name that `torch.optim` or timm knows.
        params: parameters or parameter groups.
        kwargs: further arguments of the base optimizer.
        capturable: whether a CUDA graph must be able to hold a step and the device to skip it; default False.

    Raises:
        ValueError: the name is unknown, the optimizer's ``step`` needs a closure of its own, or it is not `capturable`.
        TypeError: the optimizer does not take one of the arguments, or is no optimizer.
    """
    _check_not_within_zero()
    factory: OptimizerFactory
    if isinstance(base_optimizer, str):
        factory, kwargs = _by_name(base_optimizer, kwargs)
    else:
        factory = base_optimizer
    if not callable(factory):
        raise TypeError(f"base_optimizer must be an optimizer class or its name, got {base_optimizer!r}")
    if capturable and "capturable" in inspect.signature(factory).parameters:
        kwargs = {**kwargs, "capturable": True}
    base = factory(params, **kwargs)
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must make a torch.optim.Optimizer, got {type(base).__name__}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"base_optimizer {type(base).__name__} needs a closure of its own in every step, which AMP cannot give"
            " it; use a first-order optimizer such as SGD or AdamW"
        )
    if getattr(base, "is_second_order", False):
        raise ValueError(
            f"base_optimizer {type(base).__name__} differentiates the gradient, for which AMP keeps no graph;"
            " use a first-order optimizer such as SGD or AdamW"
        )
    groups = getattr(type(base), "param_groups", None)
    if isinstance(groups, property) and groups.fset is None:
        raise ValueError(
            f"base_optimizer {type(base).__name__} does not let its param_groups be set, so AMP cannot share them; use"
            " the optimizer inside it"
        )
    if capturable:
        check_fused(base)
    return base


def _check_not_within_zero() -> None:
    """Raise ValueError if a ZeroRedundancyOptimizer is making this optimizer, for the shard of one process."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if zero is not None else None
    while zero is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), zero.ZeroRedundancyOptimizer):
            raise ValueError(
                "ZeroRedundancyOptimizer(optimizer_class=AMP) would let each process perturb its shard alone; put it"
                " inside: AMP(params, base_optimizer=lambda params, **kwargs: ZeroRedundancyOptimizer(params,"
                " optimizer_class=torch.optim.SGD, **kwargs), lr=...)"
            )
        frame = frame.f_back


def _by_name(name: str, kwargs: dict[str, Any]) -> tuple[OptimizerFactory, dict[str, Any]]:
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    native = getattr(torch.optim, name, None)
    if isinstance(native, type) and issubclass(native, Optimizer) and native is not Optimizer:
        return native, kwargs
    known = [str(known) for known in list_optimizers(exclude_filters=["amp*"])]
    if name.lower() not in known:
        raise ValueError(
            f"base_optimizer {name!r} is unknown{did_you_mean(name.lower(), known, at_most=3)}; use a class, a name in"
            f" torch.optim (e.g. 'AdamW') or one of timm's: {', '.join(known)}"
        )
    info = get_optimizer_info(name.lower())
    momentum = {"momentum": kwargs.get("momentum", 0.9)} if info.has_momentum else {}
    kwargs = {k: v for k, v in kwargs.items() if k != "momentum"} | momentum
    return get_optimizer_class(name.lower(), bind_defaults=True), kwargs
