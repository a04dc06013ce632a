"""The policy that ascends on a part of the batch: `subset`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from amp_plugin.core.inputs import holds_tensors, is_array, map_tensors
from amp_plugin.core.policies.policy import AscentPolicy


@dataclass
class Subset(AscentPolicy):
    """Take the ascent's gradient from a part of the batch, and the descent's from the whole.

    The policy approximates the ascent gradient by that of fewer samples, which is noisier, in the same ball. A step
    costs ``1 + fraction * inner_iter`` passes; samples (or micro-batches) are rounded up to a whole number. The part is
    the first samples of the batch, so the data must be in random order; in a window of several micro-batches, the part
    is the first micro-batches. The clean loss and running statistics are those of the part.

    A batch is made of tensors and arrays with the samples along their first dimension, in tuples, lists and mappings;
    what has no dimension is passed on as it is.

    Args:
        fraction: share of the batch, in (0, 1]; with 1 the policy is ``full``.

    Raises:
        ValueError: the fraction is out of range.
    """

    name = "subset"
    fraction: float

    def __post_init__(self) -> None:
        """Raise ValueError if the fraction is out of range."""
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1:
            raise ValueError(f"subset(fraction) needs a fraction of the batch in (0, 1], got {self.fraction!r}")

    @property
    def cost(self) -> float:  # type: ignore[override]
        """The fraction."""
        return float(self.fraction)

    def select_batches(self, batches: Sequence[Any] | None) -> tuple[Sequence[Any], float]:
        """Return the first micro-batches, or the first samples of a single one, and their share.

        Raises:
            ValueError: there is no batch here to take a part of, or the batch does not tell its samples.
        """
        if not batches:
            raise ValueError(
                f"{self} needs the batch, to take a part of it, but a closure or a bare ascend() keeps it: use"
                " amp_plugin.attach(), AMPTrainer or amp_backward(), or `for part in optimizer.ascent_passes([batch])`"
            )
        if len(batches) > 1:
            kept = self._of(len(batches))
            return batches[:kept], kept / len(batches)
        rows = _rows(batches[0])
        kept = self._of(rows)
        return [map_tensors(lambda leaf: _first(leaf, kept), batches[0])], kept / rows

    def _of(self, count: int) -> int:
        return math.ceil(round(count * self.fraction, 6))


def _first(leaf: Any, count: int) -> Any:
    return leaf[:count] if _has_samples(leaf) else leaf


def _has_samples(leaf: Any) -> bool:
    return (isinstance(leaf, Tensor) or is_array(leaf)) and leaf.ndim > 0


def _rows(batch: Any) -> int:
    """Return the number of samples in a batch."""
    mappings = tree_leaves(batch, is_leaf=lambda node: isinstance(node, Mapping))
    if any(isinstance(m, Mapping) and m.get("num_items_in_batch") is not None for m in mappings):
        raise ValueError(
            "subset: this loss is divided by num_items_in_batch, the number of items in the whole batch, and so would"
            " be too small on a part of it; use amp_plugin.AMPTrainer, which counts those of the part"
        )
    leaves: list[Any] = []
    map_tensors(leaves.append, batch)
    for leaf in leaves:
        if holds_tensors(leaf) or (isinstance(leaf, Tensor) and leaf.layout != torch.strided):
            raise ValueError(
                f"subset cannot take the first samples of what is in a {type(leaf).__name__}, nor of a nested or sparse"
                " tensor; split the batch into micro-batches, of which subset takes the first ones"
            )
    shapes = [tuple(leaf.shape) for leaf in leaves if _has_samples(leaf)]
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "subset takes the first samples of every tensor in the batch, along the first dimension, which must be as"
            f" long in all of them; got shapes {', '.join(map(str, shapes)) or 'of no tensor'}"
        )
    return int(shapes[0][0])
