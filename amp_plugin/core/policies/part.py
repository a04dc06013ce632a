"""A part of the batch for the ascent, and the rest of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from amp_plugin.core.inputs import holds_tensors, is_array, map_tensors
from amp_plugin.core.policies.policy import AscentPolicy


@dataclass
class PartOfBatch(AscentPolicy):
    """A policy that ascends on a part of the batch.

    The part is the first samples, so the data must be in random order; or as many that torch's global generator draws,
    anew in every step; two at least, because BatchNorm normalises no single one. In a window of several micro-batches,
    the part is whole micro-batches. Numbers are rounded up.

    A batch is made of tensors and arrays with the samples along their first dimension, in tuples, lists and mappings;
    what has no dimension is passed on as it is. Strings of the samples are given as an array.

    Args:
        fraction: share of the batch.
        random: whether the part is drawn, for data that is not in random order; default False.

    Raises:
        ValueError: the fraction is out of range, or `random` is no truth value.
    """

    most: ClassVar[str] = "1]"  # the end of the range of fractions
    fraction: float
    random: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if an argument is out of range."""
        fraction = self.fraction
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not number or not 0 < fraction <= 1 or (fraction == 1 and self.most == "1)"):
            raise ValueError(
                f"{self.name}(fraction) needs a fraction of the batch in (0, {self.most}, got {fraction!r}"
            )
        if not isinstance(self.random, bool):
            raise ValueError(f"{self.name}(fraction, random) needs random=True or False, got {self.random!r}")

    @property
    def cost(self) -> float:  # type: ignore[override]
        """The fraction."""
        return float(self.fraction)

    @property
    def is_static(self) -> bool:  # type: ignore[override]
        """Whether the part is the first samples, and so the same places of every batch."""
        return not self.random

    def divide(self, batches: Sequence[Any] | None, *, leave: bool) -> tuple[Sequence[Any], Sequence[Any], float]:
        """Return the part of the micro-batches, or of the samples of a single one; the rest; and the part's share.

        Args:
            batches: micro-batches of a step.
            leave: whether the rest needs as much as a part does at least; if there is too little for both, the part is
                all of it, and the rest has nothing.

        Raises:
            ValueError: there is no batch here to take a part of, or the batch does not tell its samples.
        """
        if not batches:
            raise ValueError(
                f"{self} needs the batch, to take a part of it, but a closure or a bare ascend() keeps it: use"
                " amp_plugin.attach(), AMPTrainer or amp_backward(), or `for part in optimizer.ascent_passes([batch])`"
            )
        count = len(batches) if len(batches) > 1 else _rows(batches[0], self.name)
        least = 1 if len(batches) > 1 else 2
        kept = max(math.ceil(round(count * self.fraction, 6)), min(least, count))
        if leave:
            kept = count if count < 2 * least else min(kept, count - least)
        if len(batches) > 1:
            chosen = set(torch.randperm(count)[:kept].tolist() if self.random else range(kept))
            part = [batch for k, batch in enumerate(batches) if k in chosen]
            return part, [batch for k, batch in enumerate(batches) if k not in chosen], kept / count
        rows: list[Any] = [slice(None, kept), slice(kept, None)]
        if self.random:
            order = torch.randperm(count)
            rows = [order[:kept].sort().values, order[kept:].sort().values]
        part, rest = ([map_tensors(_taking(at), batches[0])] for at in rows)
        return part, rest, kept / count

    def __str__(self) -> str:
        return f"{self.name}({self.fraction!r}{', random=True' if self.random else ''})"


def _taking(rows: Any) -> Callable[[Any], Any]:
    """Return a function that takes rows, a slice or a tensor of indices, of a leaf that has samples."""

    def take(leaf: Any) -> Any:
        if not _has_samples(leaf):
            return leaf
        if isinstance(rows, slice):
            return leaf[rows]
        return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf[rows.numpy()]

    return take


def _has_samples(leaf: Any) -> bool:
    return (isinstance(leaf, Tensor) or is_array(leaf)) and leaf.ndim > 0


def _rows(batch: Any, name: str) -> int:
    """Return the number of samples in a batch, for the policy of this name."""
    mappings = tree_leaves(batch, is_leaf=lambda node: isinstance(node, Mapping))
    if any(isinstance(m, Mapping) and m.get("num_items_in_batch") is not None for m in mappings):
        raise ValueError(
            f"{name}: this loss is divided by num_items_in_batch, the number of items in the whole batch, and so would"
            " be too small on a part of it; use amp_plugin.AMPTrainer, which counts those of the part"
        )
    leaves: list[Any] = []
    map_tensors(leaves.append, batch)
    for leaf in leaves:
        if holds_tensors(leaf) or (isinstance(leaf, Tensor) and leaf.layout != torch.strided):
            raise ValueError(
                f"{name} cannot take samples of what is in a {type(leaf).__name__}, nor of a nested or sparse tensor;"
                f" split the batch into micro-batches, of which {name} takes the first ones"
            )
    shapes = [tuple(leaf.shape) for leaf in leaves if _has_samples(leaf)]
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"{name} takes samples of every tensor in the batch, along the first dimension, which must be as long in"
            f" all of them; got shapes {', '.join(map(str, shapes)) or 'of no tensor'}"
        )
    rows = int(shapes[0][0])
    if any(len(texts) == rows for texts in _texts(batch)):
        raise ValueError(
            f"{name} takes samples of tensors and arrays, and the batch has a list of {rows} strings, as long as it is;"
            " give them as a numpy array if they are of the samples, else to the module beforehand"
        )
    return rows


def _texts(thing: Any) -> Iterator[Sequence[str]]:
    """Yield the lists and tuples of strings in nested containers."""
    if isinstance(thing, (list, tuple)) and thing and all(isinstance(part, str) for part in thing):
        yield thing
    elif isinstance(thing, (Mapping, list, tuple)):
        for part in thing.values() if isinstance(thing, Mapping) else thing:
            yield from _texts(part)
