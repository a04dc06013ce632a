"""The policy that ascends where the gradient is unusually large: `adaptive`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.norms import global_squared_norm
from amp_plugin.core.policies.policy import AscentPolicy, remember
from amp_plugin.core.sharding import redistribute_like


@dataclass
class Adaptive(AscentPolicy):
    """Ascend when the squared norm of the gradient is above its usual size.

    After AE-SAM (Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023,
    https://arxiv.org/abs/2304.14647): with moving mean m and variance v of the squared norm n, ascend if
    ``n >= m + threshold * sqrt(v)``. There n belongs to this batch, at theta; here n belongs to the descent's gradient
    of the step before the last, which costs no pass and has reached the host without waiting. All processes decide
    alike, by the averaged gradient. A step costs ``1 + inner_iter * share`` passes; a lower threshold gives a higher
    share, 0 about a half. Where the loop clips the gradient to one length, all norms are alike and every step ascends.

    Args:
        threshold: excess over the mean that makes a step ascend, in standard deviations, perhaps negative; default 0.
        decay: decay of the moving mean and variance, in [0, 1); default 0.9.

    Raises:
        ValueError: a number is out of range.
    """

    name = "adaptive"
    is_deterministic = False
    # None stands for nothing yet. The pending norm was measured after the last step and was not looked at yet.
    state: ClassVar[Mapping[str, Any]] = {
        "ascent_norm": None,
        "ascent_mean": None,
        "ascent_variance": None,
        "ascent_pending": None,
    }
    threshold: float = 0.0
    decay: float = 0.9
    _arriving: AsyncScalar | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise ValueError if a number is out of range."""
        numbers = (self.threshold, self.decay)
        if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not math.isfinite(n) for n in numbers):
            raise ValueError(f"adaptive(threshold, decay) needs two numbers, got {self.threshold!r} and {self.decay!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"adaptive: decay must be in [0, 1), got {self.decay!r}")

    def ascends(self, state: Mapping[str, Any], total_steps: int | None) -> bool:
        """Return whether the last known norm is large, or none is known yet."""
        norm, mean, variance = (state[f"ascent_{name}"] for name in ("norm", "mean", "variance"))
        return norm is None or bool(norm >= mean + self.threshold * math.sqrt(variance))

    @contextmanager
    def around_step(self, base: Optimizer, ball: Iterable[Tensor]) -> Iterator[None]:
        """Take in the norm of the step before, and send the norm of this step on its way."""
        self.flush(base)
        state = base.param_groups[0]
        norm, mean, variance = (state[f"ascent_{name}"] for name in ("pending", "mean", "variance"))
        measured = global_squared_norm([redistribute_like(p.grad, p) for p in ball if p.grad is not None])
        yield
        if norm is not None and math.isfinite(norm * norm):  # the variance is of its size
            mean = norm if mean is None else self.decay * mean + (1 - self.decay) * norm
            variance = self.decay * (variance or 0.0) + (1 - self.decay) * (norm - mean) ** 2
            remember(base, ascent_norm=norm, ascent_mean=mean, ascent_variance=variance)
        remember(base, ascent_pending=None)
        self._arriving = None if measured is None else AsyncScalar(measured)

    def flush(self, base: Optimizer) -> None:
        """Put the norm on its way into the groups."""
        if self._arriving is not None:
            remember(base, ascent_pending=float(self._arriving.value()))
            self._arriving = None

    def reset(self) -> None:
        """Drop the norm on its way, which belongs to another training."""
        self._arriving = None
