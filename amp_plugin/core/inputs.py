"""The inputs of a module that is called several times with one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def map_tensors(function: Callable[[Any], Any], arguments: Any) -> Any:
    """Return nested containers like these, with the function's value in place of each thing in them."""

    def leaf(thing: Any) -> Any:
        if isinstance(thing, MutableMapping):  # e.g. a batch of transformers' tokenizers
            twin = copy.copy(thing)
            twin.update({name: map_tensors(function, value) for name, value in thing.items()})
            return twin
        return function(thing)

    return tree_map(leaf, arguments)


def detached_inputs(arguments: Any) -> Any:
    """Return inputs for one more pass, which may take a mapping to pieces and whose gradient ends at the inputs.

    Raises:
        TypeError: an input is an iterator, which a second pass could not read again.
    """
    return map_tensors(_detached_leaf, arguments)


def tensors_in(arguments: Any) -> list[Tensor]:
    """Return the tensors in nested containers, but for those whose changes autograd does not count."""
    found: list[Tensor] = []
    map_tensors(found.append, arguments)
    return [t for t in found if isinstance(t, Tensor) and not t.is_inference()]


def _detached_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.requires_grad:
        return leaf.detach().requires_grad_()
    if isinstance(leaf, Iterator):
        raise TypeError(f"a {type(leaf).__name__} can be read only once, so a second pass would see another batch")
    return leaf
