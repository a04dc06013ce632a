"""The batch of a step, which every pass must see as it came."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from amp_plugin.core.outputs import attributes_in


def map_tensors(function: Callable[[Any], Any], batch: Any) -> Any:
    """Return nested containers like these, with the function's value in place of each thing in them."""

    def leaf(thing: Any) -> Any:
        if isinstance(thing, MutableMapping):  # e.g. a batch of transformers' tokenizers
            twin = copy.copy(thing)
            twin.update({name: map_tensors(function, value) for name, value in thing.items()})
            return twin
        return function(thing)

    # A PackedSequence is a named tuple that cannot be rebuilt as one.
    return tree_map(leaf, batch, is_leaf=lambda thing: isinstance(thing, PackedSequence))


def detached_inputs(batch: Any) -> Any:
    """Return inputs for one more pass, which may take a container to pieces and whose gradient ends at the inputs.

    Containers and objects that hold tensors are copied, tensors are not.

    Raises:
        TypeError: an input is an iterator, which a second pass could not read again.
    """
    return map_tensors(_detached_leaf, batch)


def _detached_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().requires_grad_() if leaf.requires_grad else leaf
    if isinstance(leaf, Iterator):
        raise TypeError(f"a {type(leaf).__name__} can be read only once, so a second pass would see another batch")
    if holds_tensors(leaf):
        return copy.copy(leaf)  # a graph's batch, a dataclass: a pass may give it other attributes
    return leaf


def holds_tensors(thing: Any) -> bool:
    """Return whether a thing is an object, no container, with tensors or arrays in it."""
    return _is_holder(thing) and next(_leaves(thing, set()), None) is not None


class BatchWatch:
    """A `BatchWatch` remembers what a batch was at the begin of a step, and tells whether a pass has changed it.

    Args:
        batch: tensors and numpy arrays in tuples, lists, mappings, dataclasses and other objects.
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self._marks = [(leaf, _mark(leaf)) for leaf in _leaves(batch, set())]

    def check(self, culprit: str) -> None:
        """Raise RuntimeError if the batch is not what it was.

        Args:
            culprit: begin of the error, "the model changes its input".
        """
        now = list(_leaves(self._batch, set()))
        same = len(now) == len(self._marks) and all(
            leaf is before and _is_marked(leaf, mark) for leaf, (before, mark) in zip(now, self._marks, strict=True)
        )
        if not same:
            raise RuntimeError(f"{culprit} in place, so a second pass would see another batch; change a copy instead")


def _leaves(thing: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the tensors and arrays in nested containers and objects."""
    if isinstance(thing, Tensor) or is_array(thing):
        yield thing
        return
    if isinstance(thing, Mapping):
        parts: Any = thing.values()
    elif isinstance(thing, (tuple, list, set, frozenset)):
        parts = thing
    elif _is_holder(thing):
        parts = [value for _, _, value in attributes_in(thing)]
    else:
        return
    if id(thing) not in seen:  # an object may hold itself
        seen.add(id(thing))
        for part in list(parts):
            yield from _leaves(part, seen)


def _is_holder(thing: Any) -> bool:
    """Return whether a thing is an object whose attributes belong to the batch."""
    has_attributes = hasattr(thing, "__dict__") or hasattr(thing, "__slots__")
    return has_attributes and not isinstance(thing, (type, Tensor, nn.Module)) and not callable(thing)


def is_array(thing: Any) -> bool:
    """Return whether a thing is one of numpy's arrays or numbers."""
    return type(thing).__module__ == "numpy" and hasattr(thing, "tobytes") and hasattr(thing, "shape")


def _mark(leaf: Any) -> Any:
    """Return what tells whether a tensor or an array was changed: autograd's count, or a copy."""
    if isinstance(leaf, Tensor):
        return None if leaf.is_inference() else leaf._version
    return leaf.copy()


def _is_marked(leaf: Any, mark: Any) -> bool:
    return bool(_mark(leaf) == mark if isinstance(leaf, Tensor) else leaf.tobytes() == mark.tobytes())
