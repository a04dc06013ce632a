"""The policy that ascends on a part of the batch, and descends on all of it: `subset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amp_plugin.core.policies.part import PartOfBatch
from amp_plugin.core.policies.policy import BatchParts


@dataclass
class Subset(PartOfBatch):
    """Take the ascent's gradient from a part of the batch, and the descent's from the whole.

    The policy approximates the ascent gradient by that of fewer samples, which is noisier, in the same ball. A step
    costs ``1 + fraction * inner_iter`` passes. The clean loss and running statistics are those of the part.

    Args:
        fraction: share of the batch, in (0, 1]; with 1 the policy is ``full``.
        random: whether the part is drawn, for data that is not in random order; default False, the first samples.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "subset"

    def select_batches(self, batches: Sequence[Any] | None) -> BatchParts:
        """Return the part and its share; all are left for the descent."""
        part, _, share = self.divide(batches, leave=False)
        return BatchParts(part, share)
