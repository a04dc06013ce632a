"""Policies that ascend in some steps only, by their number: `every` and `window`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amp_plugin.core.policies.policy import CountsSteps


@dataclass
class Every(CountsSteps):
    """Ascend in every k-th step, the first among them; the steps between are the base optimizer's.

    The policy approximates AMP by a mixture of its update and the plain one, as the periodic methods for SAM do. A step
    costs ``1 + inner_iter / k`` passes on average.

    Args:
        k: period in steps, at least 1; with 1 it is ``full``.

    Raises:
        ValueError: k is no such number.
    """

    name = "every"
    k: int

    def __post_init__(self) -> None:
        """Raise ValueError if k is no such number."""
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"every(k) needs a whole number of steps k >= 1, got {self.k!r}")

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Return whether this is step 0, k, 2 k, ..."""
        return bool(state["ascent_step"] % self.k == 0)


@dataclass
class Window(CountsSteps):
    """Ascend only between two points of the training; outside, steps are the base optimizer's.

    The policy is AMP in the late (or early) part of a training, and the base optimizer in the rest. A step costs
    ``1 + inner_iter`` passes inside, 1 outside.

    Args:
        start: first step that ascends, an integer; or a float, a fraction of the training.
        end: first step after `start` that does not ascend, an integer; or a float, a fraction of the training.

    Raises:
        ValueError: steps and fractions are mixed, or the window is empty.
    """

    name = "window"
    start: int | float
    end: int | float

    def __post_init__(self) -> None:
        """Raise ValueError unless both bounds are steps, or both fractions, and in order."""
        bounds = (self.start, self.end)
        if any(isinstance(b, bool) or not isinstance(b, (int, float)) for b in bounds):
            raise ValueError(f"window(start, end) needs two numbers, got {self.start!r} and {self.end!r}")
        if self._fractions and not all(0 <= b <= 1 for b in bounds):
            raise ValueError(
                f"window({self.start!r}, {self.end!r}): whole numbers are steps, floats are fractions of the training"
                " between 0.0 and 1.0; give two of a kind"
            )
        if not 0 <= self.start < self.end:
            raise ValueError(f"window({self.start!r}, {self.end!r}) is empty; it needs 0 <= start < end")

    @property
    def _fractions(self) -> bool:
        return isinstance(self.start, float) or isinstance(self.end, float)

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Return whether the step is inside."""
        return state["ascent_step"] in self.steps(total_steps)

    def steps(self, total_steps: int | None) -> range:
        """Return the steps inside.

        Raises:
            ValueError: the bounds are fractions of a training whose length is not known, or no step is inside.
        """
        scale = 1
        if self._fractions:
            if total_steps is None:
                raise ValueError(
                    f"{self} is in fractions of the training, whose length is not known here: set"
                    " optimizer.total_steps, or give whole numbers of steps (AMPTrainer knows the length)"
                )
            scale = total_steps
        start, end = round(self.start * scale), round(self.end * scale)
        if total_steps is not None:
            end = min(end, total_steps)
        if not start < end:
            raise ValueError(f"{self} contains no step of a training of {total_steps}: nothing would be perturbed")
        return range(start, end)
