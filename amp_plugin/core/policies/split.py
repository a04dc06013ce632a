"""The policy that ascends on a part of the batch and descends on the rest, for the price of one pass: `split`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amp_plugin.core.policies.part import PartOfBatch
from amp_plugin.core.policies.policy import BatchParts


@dataclass
class Split(PartOfBatch):
    """Take the ascent's gradient from a part of the batch, and the descent's from the rest.

    Every sample is passed once, so a step costs ``1 + (inner_iter - 1) * fraction`` passes: with one ascent step as
    many as the base optimizer's. With g(theta; S) for the gradient of the mean loss of samples S, a batch in parts A
    and B, and the projection P onto the ball, the step descends along::

        g(theta + P(inner_lr * g(theta; A)); B)

    A and B are independent draws. So, given A, the step is an unbiased estimate of the gradient of the expected loss at
    theta + delta(A), as in cross-fitting; ``full`` and ``subset`` descend along samples that have chosen delta, where
    the loss is larger than the expected one because they have. What ``split`` gives up is the noise of a smaller
    descent batch, and the ascent's gradient is as noisy as that of ``subset``.

    The clean loss is that of A, the loss at theta + delta that of B, and the running statistics, with all that a pass
    leaves in the module, are those of the descent's pass. A batch of less than four samples is passed twice.

    Args:
        fraction: share of the batch that is A, in (0, 1); both parts have two samples, or one micro-batch, at least.
        random: whether A is drawn, for data that is not in random order; default False, the first samples.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "split"
    most = "1)"
    spares_descent = True

    def select_batches(self, batches: Sequence[Any] | None) -> BatchParts:
        """Return the part, its share, and the rest for the descent."""
        part, rest, share = self.divide(batches, leave=True)
        return BatchParts(part, share, rest if share < 1 else None)
