"""The tensors in what a module returns, which are exchanged wherever they are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, complex, type(None), type, nn.Module)


def graph_tensors(*outputs: Any) -> list[Tensor]:
    """Return the tensors that belong to a graph of autograd, each once, in nested containers and objects."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None:
            found[id(tensor)] = tensor
        return tensor

    exchange(outputs, note)
    return list(found.values())


def exchange(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return an output of the same type, with the function's value in place of each tensor.

    Containers and objects are written in place, also those whose class forbids it; tuples and read-only mappings, which
    nobody can write, are made anew.
    """
    return _Exchange(function)(output)


class _Exchange:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._done: dict[int, tuple[Any, Any]] = {}  # by identity: a thing, which so is kept alive, and its successor

    def __call__(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return self._function(thing)
        if isinstance(thing, _PLAIN):
            return thing
        if id(thing) not in self._done:
            self._done[id(thing)] = thing, thing  # an object may hold itself
            self._done[id(thing)] = thing, self._successor(thing)
        return self._done[id(thing)][1]

    def _successor(self, thing: Any) -> Any:
        if isinstance(thing, tuple):
            parts = [self(part) for part in thing]
            if all(new is old for new, old in zip(parts, thing, strict=True)):
                return thing
            return thing._make(parts) if hasattr(thing, "_make") else type(thing)(parts)
        if isinstance(thing, (MutableMapping, MutableSequence)):
            keys = list(thing) if isinstance(thing, MutableMapping) else range(len(thing))
            for key in keys:
                old = thing[key]
                if (new := self(old)) is not old:
                    thing[key] = new
        for holder, name, old in attributes_in(thing):
            if (new := self(old)) is old:
                continue
            if holder is None:
                object.__setattr__(thing, name, new)
            else:
                holder[name] = new  # not setattr(), which frozen classes refuse
        if isinstance(thing, Mapping) and not isinstance(thing, MutableMapping):
            items = {key: self(value) for key, value in thing.items()}
            if any(items[key] is not value for key, value in thing.items()):
                return type(thing)(items)  # type: ignore[call-arg]
        return thing


def attributes_in(thing: Any) -> Iterator[tuple[dict[str, Any] | None, str, Any]]:
    """Yield the attributes of an object: the dictionary that holds it, None for a slot; its name; its value."""
    if callable(thing):
        return
    held = getattr(thing, "__dict__", None)
    if isinstance(held, dict):
        yield from [(held, name, value) for name, value in held.items()]
    for cls in type(thing).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                yield None, name, getattr(thing, name)
