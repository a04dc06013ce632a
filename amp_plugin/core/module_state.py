"""The state of a module beside its trained parameters, saved and put back around the passes of a step.

State is what a forward pass may change without autograd: buffers (running statistics, queues, codebooks, observers),
parameters that require no gradient (momentum encoders), and detached tensors in plain attributes (hidden states), also
in lists, dictionaries and deques.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.module_parts import parameters_in
from amp_plugin.core.sharding import local_shard

Held = tuple[dict[str, Any], dict[str, Any]]  # a dictionary that holds state, and the part of its content that is state
Attribute = tuple[weakref.ref[nn.Module], str]  # a module and the name of one of its attributes
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_ABSENT = object()  # stands for an attribute that is not there
_CONTAINERS = (tuple, list, dict, deque)


class _Entry(NamedTuple):
    """A tensor of the state.

    Attributes:
        tensor: tensor that is held.
        alias: another view of the storage that the tensor had, in the layout that it had.
        place: address and shape of the tensor.
        value: copy of the tensor's value.
    """

    tensor: Tensor
    alias: Tensor
    place: tuple[int, torch.Size]
    value: Tensor


class _Container(NamedTuple):
    """A list, dictionary or deque in a plain attribute, which a pass may change in place.

    Attributes:
        holder: attributes of the module.
        name: name among them.
        container: container that is held.
        content: shallow copy of it.
    """

    holder: dict[str, Any]
    name: str
    container: Any
    content: Any


class ModuleState:
    """A copy of the state at one moment, whose storage is kept from step to step.

    Values are put back whether or not a pass has changed them: what torch's kernels write (BatchNorm's statistics) and
    what is written through ``.data`` leaves no trace in a version counter, and to compare values would make the host
    wait. Tensors that cannot be written in place (expanded ones, those of inference mode) are left alone.
    """

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._containers: list[_Container] = []
        self._entries: list[_Entry] = []
        self._alike: list[tuple[list[Tensor], list[Tensor]]] = []  # tensors and values of the entries, by kind
        self._versions: list[int] = []  # autograd's version counters of the tensors
        self._candidates: list[Tensor] = []  # what was held, also what is no state or cannot be written

    @torch.no_grad()
    def save(self, held: list[Held], excluded: Set[int] = frozenset()) -> None:
        """Copy the state as it is now.

        Args:
            held: dictionaries that hold state, each with the part of its content that is state.
            excluded: identities of tensors that are no state, though they are held like some; default none.
        """
        self._held = held
        self._containers = [c for holder, content in held if _is_plain(holder) for c in _containers(holder, content)]
        candidates: list[Tensor] = []
        for _, content in held:
            for value in content.values():
                candidates += (value,) if type(value) is Tensor else _tensors(value)
        if not self._holds(candidates):  # as it does in almost every step
            self._candidates = candidates
            state = [t for t in {id(t): t for t in candidates}.values() if id(t) not in excluded and is_dense(t)]
            tensors = [local_shard(t) for t in state]
            values = [entry.value for entry in self._entries]
            if [_layout(t) for t in tensors] != [_layout(v) for v in values]:
                values = [torch.empty_like(t) for t in tensors]
            pairs = zip(tensors, values, strict=True)
            self._set_entries([_Entry(t, t.detach(), place_of(t), value) for t, value in pairs])
        for tensors, values in self._alike:
            torch._foreach_copy_(values, tensors)
        self._versions = [e.tensor._version for e in self._entries]

    def _set_entries(self, entries: list[_Entry]) -> None:
        self._entries = entries
        alike: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
        for entry in entries:
            # A batched kernel takes one launch a tensor where they differ in this: BatchNorm's counters are integers.
            tensors, values = alike.setdefault((entry.tensor.device, entry.tensor.dtype), ([], []))
            tensors.append(entry.tensor)
            values.append(entry.value)
        self._alike = list(alike.values())

    def _holds(self, candidates: list[Tensor]) -> bool:
        """Return whether the tensors are those that were saved last, in the same places."""
        return (
            len(candidates) == len(self._candidates)
            and all(now is before for now, before in zip(candidates, self._candidates, strict=True))
            and all(place_of(tensor) == place for tensor, _, place, _ in self._entries)
        )

    @not_compiled
    @torch.no_grad()
    def load(self) -> None:
        """Put the state back as it was."""
        for holder, content in self._held:
            for name, value in content.items():
                if value is _ABSENT:
                    holder.pop(name, None)
                elif holder.get(name, _ABSENT) is not value:
                    holder[name] = value
        for _, _, container, before in self._containers:
            container.clear()
            (container.update if isinstance(container, dict) else container.extend)(before)
        for tensor, alias, place, _ in self._entries:
            if place_of(tensor) != place:
                tensor.data = alias  # the pass has given the tensor other data, or another size
        for tensors, values in self._alike:
            torch._foreach_copy_(tensors, values)

    def load_for_graph(self) -> None:
        """Put the state back together with its version counters, for the graph that was recorded with them."""
        self.load()
        tensors = tuple(entry.tensor for entry in self._entries)
        torch._C._autograd._unsafe_set_version_counter(tensors, tuple(self._versions))

    def settle_attributes(self, parts: list[nn.Module]) -> tuple[list[Attribute], list[Attribute]]:
        """Find the plain attributes with detached tensors that have changed; forget all others. This waits.

        An attribute that requires a gradient belongs to the graph of a pass, and is left to the last one.

        Args:
            parts: parts of the module.

        Returns:
            These attributes; and those with containers of tensors that require a gradient and have become longer.
        """
        was: dict[tuple[int, str], list[_Container]] = {}
        for c in self._containers:
            was.setdefault((id(c.holder), c.name), []).append(c)
        contents = [content for holder, content in self._held if _is_plain(holder)]
        plain = {id(t) for content in contents for value in content.values() for t in _tensors(value)}
        entries = [e for e in self._entries if id(e.tensor) in plain]
        changed = {id(e.tensor) for e in entries if not torch.equal(e.tensor, e.value)}
        owners = {id(vars(part)): weakref.ref(part) for part in parts}
        found: list[Attribute] = []
        growing: list[Attribute] = []
        names: set[tuple[int, str]] = set()
        held: list[Held] = []
        for holder, content in self._held:
            kept = content
            if _is_plain(holder):
                kept = {}
                for name, now in holder.items():
                    if name in _REGISTRIES:
                        continue
                    before, inside = content.get(name, _ABSENT), was.get((id(holder), name), [])
                    tensors = [*_tensors(before), *_tensors(now), *(t for c in inside for t in _tensors(c.content))]
                    is_other = before is not now or any(id(t) in changed for t in tensors)
                    is_other = is_other or any(_is_other(c.container, c.content) for c in inside)
                    if any(t.requires_grad for t in tensors):
                        if id(holder) in owners and any(_is_longer(c.container, c.content) for c in inside):
                            growing.append((owners[id(holder)], name))
                    elif is_other and tensors:
                        kept[name] = before
                found += [(owners[id(holder)], name) for name in kept if id(holder) in owners]
                names |= {(id(holder), name) for name in kept}
            if kept:
                held.append((holder, kept))
        self._held = held
        self._containers = [c for key, inside in was.items() if key in names for c in inside]
        state = {id(t) for _, content in held for value in content.values() for t in _tensors(value)}
        self._set_entries([entry for entry in self._entries if id(entry.tensor) in state])
        return found, growing


def buffers_and_frozen_of(parts: list[nn.Module], *, buffers: bool, moving: Set[int]) -> list[Held]:
    """Return the buffers, if asked for, and the parameters that require no gradient, of the parts of a module.

    Frozen parameters that take more memory than the others are left out: they are a backbone, or what adapters were
    added to, which no forward pass moves, and copies are dear; but for those that were found moving.

    Args:
        parts: parts of the module.
        buffers: whether buffers are state.
        moving: identities of frozen parameters that a pass moves.
    """
    found: list[Held] = []
    frozen: list[Held] = []
    for part in parts:
        if buffers and part._buffers:
            found.append((part._buffers, dict(part._buffers)))  # with those that are None, which a pass may fill
        params = part._parameters
        if params and (held := {name: p for name, p in params.items() if p is not None and not p.requires_grad}):
            frozen.append((params, held))
    if frozen:
        if is_backbone(parameters_in(parts)):
            frozen = [(holder, {n: p for n, p in held.items() if id(p) in moving}) for holder, held in frozen]
        found += [(holder, held) for holder, held in frozen if held]
    return found


def is_backbone(params: list[Tensor]) -> bool:
    """Return whether the frozen ones among these parameters take more memory than the others."""
    return sum(-p.nbytes if p.requires_grad else p.nbytes for p in params) > 0


def attributes_of(parts: list[nn.Module]) -> list[Held]:
    """Return the plain attributes of the parts of a module; what holds no tensor now may hold one after a pass."""
    return [(vars(part), {n: v for n, v in vars(part).items() if n not in _REGISTRIES}) for part in parts]


def held_now(attributes: list[Attribute]) -> list[Held]:
    """Return what is in these attributes now."""
    parts = [(part, name) for ref, name in attributes if (part := ref()) is not None]
    return [(vars(part), {name: vars(part).get(name, _ABSENT)}) for part, name in parts]


def trained_among(module: nn.Module, held: list[Held]) -> set[int]:
    """Return the identities of tensors among these that are trained weights, or share the memory of some."""
    weights = {_storage(local_shard(p)) for p in module.parameters() if p.requires_grad and is_dense(p)}
    found = {id(t): t for _, content in held for value in content.values() for t in _tensors(value)}
    shared = {key for key, t in found.items() if is_dense(t) and _storage(local_shard(t)) in weights}
    return shared | {key for key, t in found.items() if t.requires_grad}


def _is_plain(holder: dict[str, Any]) -> bool:
    """Return whether these are the attributes of a module, not its buffers or its parameters."""
    return "_buffers" in holder


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _CONTAINERS):
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _containers(holder: dict[str, Any], content: dict[str, Any]) -> Iterator[_Container]:
    """Yield the containers in plain attributes that can be changed in place."""
    for name, value in content.items():
        waiting, seen = [value], set[int]()
        while waiting:
            container = waiting.pop()
            if isinstance(container, _CONTAINERS) and id(container) not in seen:
                seen.add(id(container))
                waiting += container.values() if isinstance(container, dict) else container
                if not isinstance(container, tuple):
                    yield _Container(holder, name, container, copy.copy(container))


def _is_other(container: Any, before: Any) -> bool:
    """Return whether a container has other things in it than before, or in another order."""
    now, then = (list(c.items() if isinstance(c, dict) else enumerate(c)) for c in (container, before))
    return len(now) != len(then) or any(k != n or v is not w for (k, v), (n, w) in zip(now, then, strict=True))


def _is_longer(container: Any, before: Any) -> bool:
    """Return whether things were added to a container, and none taken away."""
    now, then = ({id(x) for x in (c.values() if isinstance(c, dict) else c)} for c in (container, before))
    return len(container) > len(before) and then <= now


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor can be copied and written in place; torch refuses in-place writes to the others."""
    if type(tensor) is FakeTensor or tensor.is_nested or tensor.layout is not torch.strided or tensor.is_inference():
        return False
    if tensor.is_conj() or tensor.is_neg():  # lazily conjugated, which batched kernels do not write
        return False
    return not any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def place_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Return the address and the shape of a tensor."""
    return tensor.data_ptr(), tensor.shape
