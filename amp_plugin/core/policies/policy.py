"""The interface of an ascent policy: which steps ascend, on which samples, along which gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.deprecation import Renamed, warn_renamed

_RENAMED = {
    "part": "select_batches",
    "settle": "flush",
    "forget": "reset",
    "foreseeable": "is_deterministic",
}


class BatchParts(NamedTuple):
    """What the passes of a step run on.

    Attributes:
        ascent: micro-batches for the passes of the ascent.
        share: how large a share of the step these are.
        descent: micro-batches for the pass of the descent; None for all of the step.
    """

    ascent: Sequence[Any]
    share: float
    descent: Sequence[Any] | None = None


@dataclass
class AscentPolicy:
    """A policy decides about the ascents of a training. The methods here are the paper's choice, to be overridden.

    A step without an ascent is one of the base optimizer. What a policy has to remember from step to step lives in the
    optimizer's groups and state, so it is saved, loaded and copied with them.

    Attributes:
        name: name in ``ascent=``.
        state: values that the policy keeps in every parameter group, as they are at the start.
        cost: price of an ascent, in forward and backward passes over the batch; 0 if a direction is there already.
        copies: number of copies of the perturbed parameters that the policy keeps.
        is_deterministic: whether :meth:`ascends` is known before the training.
        is_static: whether all steps make passes of the same kind, so that one of them can be captured and replayed.
        spares_descent: whether a step that ascends spares the descent the samples of the ascent.
    """

    part, settle, forget, foreseeable = map(Renamed, _RENAMED.values())

    name: ClassVar[str]
    state: ClassVar[Mapping[str, Any]] = {}
    cost: ClassVar[float] = 1.0
    copies: ClassVar[int] = 0
    is_deterministic: ClassVar[bool] = True
    is_static: ClassVar[bool] = False
    spares_descent: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls):  # a policy of a user's, written for the old names
                warn_renamed(f"{cls.__name__}.{old}", new, stacklevel=2)
                setattr(cls, new, vars(cls)[old])

    def check(self, *, inner_iter: int, capturable: bool) -> None:
        """Raise ValueError if the policy cannot be followed with that many ascent steps, or in a captured step."""
        if capturable and not self.is_static:
            raise ValueError(
                "capturable=True replays one step: it needs steps that are all alike, ascent='full', 'subset(0.25)' or"
                f" 'split(0.25)', got {str(self)!r}"
            )
        if not self.cost and inner_iter > 1:
            raise ValueError(f"ascent={str(self)!r} has one direction: inner_iter must be 1, got {inner_iter}")

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Return whether the coming step ascends.

        Args:
            state: a parameter group with the values of :attr:`state`.
            total_steps: number of steps of the training; None if it is not known.
        """
        return True

    def select_batches(self, batches: Sequence[Any] | None) -> BatchParts:
        """Return the micro-batches of a step to ascend on, their share, and those to descend on, if not on all."""
        return BatchParts(batches or (), 1.0)

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return tensors to ascend along, by parameter, if :attr:`cost` is 0; the caller may overwrite them.

        Args:
            base: the base optimizer.
            ball: parameters to perturb.
        """
        raise NotImplementedError

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Surround the step of the base optimizer, whose gradients are in ``.grad``."""
        yield

    def flush(self, base: Optimizer) -> None:
        """Put what is still on its way into the groups, before the optimizer is saved or copied."""

    def reset(self) -> None:
        """Drop what is on its way, because the optimizer was given another state."""

    def __str__(self) -> str:
        arguments = ", ".join(repr(getattr(self, f.name)) for f in fields(self) if f.init)
        return f"{self.name}({arguments})" if arguments else self.name


@dataclass
class Full(AscentPolicy):
    """Ascend in every step on the whole batch, as in the paper. A step costs ``1 + inner_iter`` passes."""

    name = "full"
    is_static = True


class CountsSteps(AscentPolicy):
    """A policy that counts the steps that the base optimizer has made."""

    state: ClassVar[Mapping[str, Any]] = {"ascent_step": 0}

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Count one step more."""
        step = base.param_groups[0]["ascent_step"] + 1
        yield
        remember(base, ascent_step=step)


def remember(base: Optimizer, **values: Any) -> None:
    """Keep values in every group, so that they survive when a checkpoint is loaded with other groups."""
    for group in base.param_groups:
        group.update(values)
