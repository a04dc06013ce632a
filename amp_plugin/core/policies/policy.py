"""What an ascent policy is: which steps ascend, over which samples, along which gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


@dataclass
class AscentPolicy:
    """Decides about the ascents of a training. The methods here are the paper's choice; a policy overrides some.

    A step without an ascent is one of the base optimizer. What a policy has to remember from step to step lives in the
    optimizer's groups and state, so it is saved, loaded and copied with them.

    Attributes:
        name: how it is spelt in ``ascent=``.
        state: what it keeps in every parameter group, with the values at the start.
        cost: of an ascent, in forward and backward passes over the batch; 0 if its direction is there already.
        copies: of the perturbed parameters that it keeps.
        is_deterministic: whether :meth:`ascends` is known before the training.
    """

    name: ClassVar[str]
    state: ClassVar[Mapping[str, Any]] = {}
    cost: ClassVar[float] = 1.0
    copies: ClassVar[int] = 0
    is_deterministic: ClassVar[bool] = True

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Whether the coming step ascends.

        Args:
            state: a parameter group with the values of :attr:`state`.
            total_steps: of the training, if it is known.
        """
        return True

    def select_batches(self, batches: Sequence[Any] | None) -> tuple[Sequence[Any], float]:
        """The micro-batches to ascend on, of those of a step, and how large a share they are."""
        return batches or (), 1.0

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Where :attr:`cost` is 0: what to ascend along, by parameter of the ball; the caller may overwrite it."""
        raise NotImplementedError

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Around the step of the base optimizer, with the gradients that it takes in ``.grad``."""
        yield

    def flush(self, base: Optimizer) -> None:
        """Before the optimizer is saved or copied: what is still on its way goes into the groups."""

    def reset(self) -> None:
        """The optimizer was given another state."""

    def __str__(self) -> str:
        arguments = ", ".join(repr(getattr(self, f.name)) for f in fields(self) if f.init)
        return f"{self.name}({arguments})" if arguments else self.name


@dataclass
class Full(AscentPolicy):
    """Every step ascends on the whole batch, as in the paper. Cost of a step: ``1 + inner_iter`` passes."""

    name = "full"


class CountsSteps(AscentPolicy):
    """A policy that has to know how many steps the base optimizer has made."""

    state: ClassVar[Mapping[str, Any]] = {"ascent_step": 0}

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Count one more."""
        step = base.param_groups[0]["ascent_step"] + 1
        yield
        remember(base, ascent_step=step)


def remember(base: Optimizer, **values: Any) -> None:
    """Keep values in every group, so that they survive when a checkpoint is loaded with other groups."""
    for group in base.param_groups:
        group.update(values)
