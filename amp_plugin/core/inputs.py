"""The arguments of a module that is called several times with the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def map_tensors(function: Callable[[Any], Any], arguments: Any) -> Any:
    """The same nested containers with the function's value for each thing in them."""

    def leaf(thing: Any) -> Any:
        if isinstance(thing, MutableMapping):  # e.g. a batch of transformers' tokenizers
            twin = copy.copy(thing)
            twin.update({name: map_tensors(function, value) for name, value in thing.items()})
            return twin
        return function(thing)

    return tree_map(leaf, arguments)


def detached_inputs(arguments: Any) -> Any:
    """Arguments for a pass of our own: it may take a batch dict to pieces, and its gradient ends at the inputs.

    Raises:
        TypeError: one is an iterator.
    """
    return map_tensors(_detached_leaf, arguments)


def tensors_in(arguments: Any) -> list[Tensor]:
    """All tensors in nested containers whose changes autograd counts."""
    found: list[Tensor] = []
    map_tensors(found.append, arguments)
    return [t for t in found if isinstance(t, Tensor) and not t.is_inference()]


def _detached_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.requires_grad:
        return leaf.detach().requires_grad_()
    if isinstance(leaf, Iterator):
        raise TypeError(f"a {type(leaf).__name__} can be read only once, so a second pass would see another batch")
    return leaf
