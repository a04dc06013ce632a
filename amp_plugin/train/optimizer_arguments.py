"""Make a training's optimizer once before there is a model, so that a mistake in its arguments is found at once."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import get_scheduler

from amp_plugin.suggest import did_you_mean
from amp_plugin.train.options import RecipeArguments
from amp_plugin.train.trainer import RecipeTrainer

_ELSEWHERE = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and --adam_beta2",
    "eps": "adam_epsilon",
}
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def check_optimizer(args: RecipeArguments) -> None:
    """Raise a ValueError if the optimizer or its schedule does not take its arguments, or a package is missing.

    The stock Trainer passes over arguments of ``--optim_args`` that the optimizer does not take.
    """
    given = _parsed(args.optim_args)
    try:
        cls, kwargs = _chosen(args, given)
    except ImportError as error:
        raise ValueError(f"--optim {args.optim}: {' '.join(str(error).split())}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        if not given:
            if "pass a model" in str(error):  # it looks for the layers that it works on
                return
            said = str(error)
            raise ValueError(said if said.startswith("--optim") else f"--optim {args.optim}: {said}") from error
        _chosen(args, {})  # an error that is not about the arguments has its own words
        raise ValueError(f"--optim_args {args.optim_args}: {error}") from error
    if {"params", "model", "optimizer_dict"} & kwargs.keys() or not isinstance(cls, type):
        return
    base = kwargs.get("base_optimizer", cls)
    parameters = inspect.signature(base).parameters
    for name, value in given.items():
        if name == "weight_decay" or not _takes(args, name):  # the Trainer's own weight decay replaces that one
            _refuse(args, name, [known for known in parameters if known != "weight_decay" and _takes(args, known)])
        default = parameters[name].default if name in parameters else None
        if isinstance(default, bool) and value.lower() not in _TRUE + _FALSE:
            raise ValueError(f"--optim_args: {name} must be true or false, got {value!r}")
    try:
        optimizer = cls([torch.nn.Parameter(torch.zeros(2, 2))], **kwargs)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--optim {args.optim} with these arguments: {' '.join(str(error).split())}") from error
    _check_schedule(args, optimizer)


def _parsed(text: str | None) -> dict[str, str]:
    """Return ``--optim_args`` by name, as the stock Trainer reads it."""
    given: dict[str, str] = {}
    for part in (text or "").replace(" ", "").split(",") if text else []:
        name, equals, value = part.partition("=")
        if not name or not equals or not value or "=" in value:
            raise ValueError(f"--optim_args must be NAME=VALUE,NAME=VALUE, got {text!r}")
        if name in given:
            raise ValueError(f"--optim_args has {name} twice: {text!r}")
        if value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise ValueError(f"--optim_args: {name} must be finite, got {value}")
        given[name] = value
    return given


def _chosen(args: RecipeArguments, given: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    asked = copy.copy(args)
    asked.optim_args = ",".join(f"{name}={value}" for name, value in given.items()) or None
    cls, kwargs = RecipeTrainer.get_optimizer_cls_and_kwargs(asked)
    return cls, kwargs


def _takes(args: RecipeArguments, name: str) -> bool:
    """Tell whether an argument makes a difference; the stock Trainer nowhere lists those of an optimizer."""
    _, plain = _chosen(args, {})
    for value in ("0.123", "true", "7"):
        try:
            _, kwargs = _chosen(args, {name: value})
        except (AttributeError, TypeError, ValueError):
            return True
        if kwargs != plain:
            return True
    return False


def _refuse(args: RecipeArguments, name: str, known: list[str]) -> None:
    if name in _ELSEWHERE:
        hint = f"; say --{_ELSEWHERE[name]}"
    else:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        hint = f"{did_you_mean(name, known)}; {takes}"
    raise ValueError(f"--optim_args: {args.base_optim} takes no {name!r} there{hint}")


def _check_schedule(args: RecipeArguments, optimizer: torch.optim.Optimizer) -> None:
    if args.lr_scheduler_type == "steps":
        if args.lr_scheduler_kwargs:
            raise ValueError("--lr_scheduler_kwargs: the schedule 'steps' takes --lr_milestones and --lr_gamma instead")
        return
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    kwargs: Any = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(1000),
            num_training_steps=1000,
            scheduler_specific_kwargs=kwargs,
        )
    except Exception as error:  # each schedule fails in its own way
        said = " ".join(str(error).split())
        raise ValueError(f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {kwargs}: {said}") from error
