"""The search for what a pass changes in a module: plain attributes, and frozen parameters that are dear to copy."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.module_parts import parameters_in, parts_of
from amp_plugin.core.module_state import (
    Attribute,
    ModuleState,
    attributes_of,
    buffers_and_frozen_of,
    held_now,
    is_backbone,
    is_dense,
    place_of,
    trained_among,
)
from amp_plugin.core.sharding import local_shard
from amp_plugin.core.warn import warn_user

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StateSearch:
    """A `StateSearch` decides what is saved of a module around a pass, by what the clean passes 1, 2, 4, 8, ... change.

    The search adds nothing to the steps in between. A warning tells what was found so late that it had not been
    replayed before. The search begins anew when a layer is replaced.

    Args:
        module: module whose state is looked for.
        buffers: whether buffers are state.

    Attributes:
        looks: whether the clean pass under way shows what changes.
    """

    def __init__(self, module: nn.Module, *, buffers: bool) -> None:
        self._module, self._buffers = module, buffers
        self._passes = 0  # clean passes since the parts of the module are what they are
        self.looks = False
        self._parts: list[weakref.ref[nn.Module]] = []
        self._attributes: list[Attribute] = []
        self._moving: dict[int, TensorWeakRef] = {}  # frozen parameters of a backbone that a pass moves, by identity
        self._fingerprint: Fingerprint | None = None
        self._excluded: set[int] = set()  # identities of weights that a plain attribute holds too

    def begin(self, start: ModuleState, *, may_wait: bool) -> None:
        """Save the state at the begin of a clean pass.

        Args:
            start: where the state is saved.
            may_wait: whether the host may wait for the device at the end of the pass, as it does if it looks.
        """
        parts = parts_of(self._module)
        if not self._knows(parts):
            self._parts = [weakref.ref(part) for part in parts]
            self._passes = 0
        self._passes += 1
        self.looks |= self._passes & (self._passes - 1) == 0 and may_wait  # a power of two
        self.save(start, parts)
        self._fingerprint = Fingerprint(parts) if self.looks else None

    @not_compiled
    def save(self, state: ModuleState, parts: list[nn.Module] | None = None) -> None:
        """Save the state as it is now."""
        parts = parts_of(self._module) if parts is None else parts
        held = buffers_and_frozen_of(parts, buffers=self._buffers, moving=self._moving.keys())
        if self.looks:
            held += attributes_of(parts)
            self._excluded = trained_among(self._module, held)
        else:
            held += held_now(self._attributes)
        state.save(held, self._excluded)

    def settle(self, start: ModuleState) -> None:
        """Find, at the end of a clean pass that looks, what it has changed; keep nothing else in its begin."""
        self.looks = False
        parts = parts_of(self._module)
        found, growing = start.settle_attributes(parts)
        new = [attribute for attribute in found if attribute not in self._attributes]
        self._attributes += new
        if new and self._passes > 2:  # the pass before the second was looked at as well
            self._tell(new, "changes in a pass, which is seen only now: it was not replayed before, but a buffer is")
        if growing and self._passes == 2:  # the first pass may fill what stays so
            self._tell(growing, "grows in every pass of a step: tensors that require a gradient are not replayed")
        moved = {id(p) for p in self._fingerprint.moved()} - self._moving.keys() if self._fingerprint else set()
        self._fingerprint = None
        if moved:
            held = [(part, name, p) for part in parts for name, p in part._parameters.items() if id(p) in moved]
            self._moving |= {id(p): TensorWeakRef(p) for _, _, p in held if p is not None}
            attributes = [(weakref.ref(part), name) for part, name, _ in held]
            self._tell(attributes, "is frozen, but a pass moves it, so it is copied from now on")

    def _knows(self, parts: list[nn.Module]) -> bool:
        """Return whether these are the parts that the module had in the clean pass before."""
        same = len(parts) == len(self._parts)
        return same and all(ref() is part for ref, part in zip(self._parts, parts, strict=True))

    def _tell(self, attributes: list[Attribute], what: str) -> None:
        ref, name = attributes[0]
        path = next((path for path, part in self._module.named_modules() if part is ref()), "")
        more = f" (and {len(attributes) - 1} more)" if len(attributes) > 1 else ""
        warn_user(f"AMP: {f'{path}.{name}'.lstrip('.')}{more} of {type(self._module).__name__} {what}")


class Fingerprint:
    """A `Fingerprint` tells later whether frozen parameters that are not copied have moved.

    A fingerprint holds version counters, places and sums. The sums are over the bits of all numbers, read as integers,
    because writes through ``.data`` leave no other trace.

    Args:
        parts: parts of a module whose frozen parameters are looked at, if they take more memory than the others.
    """

    @torch.no_grad()
    def __init__(self, parts: list[nn.Module]) -> None:
        params = parameters_in(parts)
        frozen = [p for p in params if not p.requires_grad and is_dense(p) and not p.is_meta]
        self._params = frozen if is_backbone(params) else []
        self._traces = self._traces_now()
        self._sums = _sums_of_bits(self._params)

    def moved(self) -> list[Tensor]:
        """Return the parameters that have moved since. This waits for the device."""
        if not self._params:
            return []
        changed = (torch.stack(self._sums) != torch.stack(_sums_of_bits(self._params))).tolist()
        traces = zip(self._traces_now(), self._traces, strict=True)
        return [p for p, c, (now, before) in zip(self._params, changed, traces, strict=True) if c or now != before]

    def _traces_now(self) -> list[tuple[object, ...]]:
        return [(p._version, *place_of(local_shard(p))) for p in self._params]


def _sums_of_bits(params: Sequence[Tensor]) -> list[Tensor]:
    sums = []
    for p in params:
        bits = _BITS.get(p.element_size()) if type(p.data) is Tensor else None  # subclasses have a layout of their own
        sums.append(p.detach().view(bits).sum(dtype=torch.int64) if bits else torch.zeros((), dtype=torch.int64))
    return [s.to(sums[0].device) for s in sums]
