"""Several policies at once: a step ascends if all of them agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.policies.part import PartOfBatch
from amp_plugin.core.policies.policy import AscentPolicy, BatchParts, Full
from amp_plugin.core.policies.schedule import Every, Window
from amp_plugin.core.policies.stale import Remembered


@dataclass
class Combined(AscentPolicy):
    """Ascend where each of several policies does. Their order does not matter; steps count over the whole training.

    Args:
        policies: two or more policies of different kinds.

    Raises:
        ValueError: the policies do not go together.
    """

    name = "combined"
    policies: tuple[AscentPolicy, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if the policies do not go together."""
        names = [p.name for p in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"ascent={str(self)!r}: each policy can be given once")
        if any(isinstance(p, Full) for p in self.policies):
            raise ValueError(f"ascent={str(self)!r}: 'full' ascends in every step on the whole batch, and stands alone")
        sources = [p.name for p in self.policies if isinstance(p, Remembered)]
        if len(sources) > 1:
            raise ValueError(f"ascent={str(self)!r}: there can be one direction only, {' or '.join(sources)}")
        parts = [p.name for p in self.policies if isinstance(p, PartOfBatch)]
        if len(parts) > 1:
            raise ValueError(f"ascent={str(self)!r}: there can be one part only, {' or '.join(parts)}")
        if sources and parts:
            raise ValueError(f"ascent={str(self)!r}: {sources[0]} makes no ascent pass, so there is no part of one")

    @property
    def state(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What all the policies keep."""
        return {name: value for p in self.policies for name, value in p.state.items()}

    @property
    def cost(self) -> float:  # type: ignore[override]
        """The product of the costs."""
        return math.prod(p.cost for p in self.policies)

    @property
    def copies(self) -> int:  # type: ignore[override]
        """The sum of the copies."""
        return sum(p.copies for p in self.policies)

    @property
    def is_deterministic(self) -> bool:  # type: ignore[override]
        """Whether all the policies are deterministic."""
        return all(p.is_deterministic for p in self.policies)

    @property
    def spares_descent(self) -> bool:  # type: ignore[override]
        """Whether one of the policies does."""
        return any(p.spares_descent for p in self.policies)

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Return whether all policies ascend.

        Raises:
            ValueError: a policy cannot tell, or no step of the `window` is one in which `every` ascends.
        """
        of = {type(p): p for p in self.policies}
        window, every = of.get(Window), of.get(Every)
        if isinstance(window, Window) and isinstance(every, Every):
            steps = window.steps(total_steps)
            if -(-steps.start // every.k) * every.k not in steps:
                raise ValueError(
                    f"ascent={str(self)!r}: none of its steps is in its window; nothing would be perturbed"
                )
        return all(p.ascends(state, total_steps) for p in self.policies)

    def select_batches(self, batches: Sequence[Any] | None) -> BatchParts:
        """Return the parts of the policy that takes some, if there is one, else all."""
        return next((p for p in self.policies if isinstance(p, PartOfBatch)), Full()).select_batches(batches)

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the directions of the policy that has some."""
        return next(p for p in self.policies if isinstance(p, Remembered)).directions(base, ball)

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Surround the step by all policies."""
        ball = list(ball)
        with ExitStack() as stack:
            for p in self.policies:
                stack.enter_context(p.around_step(base, ball))
            yield

    def flush(self, base: Optimizer) -> None:
        """Flush all policies."""
        for p in self.policies:
            p.flush(base)

    def reset(self) -> None:
        """Reset all policies."""
        for p in self.policies:
            p.reset()

    def __str__(self) -> str:
        return ", ".join(map(str, self.policies))
