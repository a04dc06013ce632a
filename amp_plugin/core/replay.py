"""All passes of a step are one function at several weights: running statistics and random numbers are replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from amp_plugin.core.deprecation import Renamed

BatchNormPolicy = Literal["clean", "all"]
RngPolicy = Literal["same", "fresh"]
_Place = tuple[dict[str, Any], str]


class SeenBuffer(NamedTuple):
    """A buffer as a pass has left it.

    Attributes:
        place: dictionary of buffers of a module, and the buffer's name in it.
        tensor: buffer that is held there.
        value: copy of the buffer's value.
        version: autograd's version counter of the buffer.
    """

    place: _Place
    tensor: Tensor
    value: Tensor
    version: int


class ExtraPasses:
    """Guards of the passes of a training step, under which the passes after the first leave no trace in the module.

    Args:
        module: module whose buffers (BatchNorm running statistics and counters, and those of any custom layer) and
            whose devices' random number generators are replayed.
        batch_norm: ``"clean"`` (default) to keep in the buffers what the clean pass, at theta, has written, so that
            running statistics describe the weights that are kept; ``"all"`` to let every pass update them, as the
            released code of the paper does.
        rng: ``"same"`` (default) to let every pass of a step draw the random numbers (dropout masks, drop-path) of the
            clean pass, so that a step consumes the generator as a single pass would; ``"fresh"`` to let each pass draw
            new ones.

    Raises:
        ValueError: a policy is unknown.
    """

    number = Renamed("nth")
    extra = Renamed("perturbed")

    def __init__(self, module: nn.Module, *, batch_norm: BatchNormPolicy = "clean", rng: RngPolicy = "same") -> None:
        check_policies(batch_norm, rng)
        self.module = module
        self.batch_norm = batch_norm
        self.rng = rng
        self._rng_states: dict[torch.device, Tensor] = {}
        self._snapshot: list[Tensor] = []

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Guard the clean pass, at theta: remember where its random numbers start."""
        if self.rng == "same":
            self._rng_states = {device: _get_rng_state(device) for device in self._devices()}
        yield

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Guard a pass at theta + delta: replay the random numbers, and put the buffers back afterwards."""
        for device, state in self._rng_states.items():
            _set_rng_state(device, state)
        with self._buffers_kept():
            yield

    def nth(self, index: int) -> AbstractContextManager[None]:
        """Return the guard of a pass by its index in the step: :meth:`clean` for 0, wherever the weights are."""
        return self.perturbed() if index else self.clean()

    def seen_buffers(self) -> list[SeenBuffer]:
        """Return, at the end of a perturbed forward pass, what its backward pass may need to find in the buffers."""
        held = self._kept()
        values = [torch.empty_like(b) for _, b in held]
        if held:
            with torch.no_grad():
                torch._foreach_copy_(values, [b for _, b in held])
        return [SeenBuffer(place, b, value, b._version) for (place, b), value in zip(held, values, strict=True)]

    @contextmanager
    def backward(self, seen: list[SeenBuffer]) -> Iterator[None]:
        """Guard the backward pass of a perturbed forward pass that is over; checkpointed layers run again in it."""
        with self._buffers_kept():
            if seen:
                places, buffers, values, versions = zip(*seen, strict=True)
                _put(zip(places, buffers, strict=True))
                with torch.no_grad():
                    torch._foreach_copy_(buffers, values)
                torch._C._autograd._unsafe_set_version_counter(buffers, versions)  # as the forward pass recorded it
            yield

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        held = self._kept()
        if not held:
            yield
            return
        buffers = [buffer for _, buffer in held]
        if [_layout(b) for b in buffers] != [_layout(s) for s in self._snapshot]:
            self._snapshot = [torch.empty_like(b) for b in buffers]
        with torch.no_grad():
            torch._foreach_copy_(self._snapshot, buffers)
        try:
            yield
        finally:
            _put(held)
            with torch.no_grad():
                torch._foreach_copy_(buffers, self._snapshot)

    def _kept(self) -> list[tuple[_Place, Tensor]]:
        holders = [m._buffers for m in self.module.modules()] if self.batch_norm == "clean" else []
        return [((holder, name), b) for holder in holders for name, b in holder.items() if b is not None]

    def _devices(self) -> set[torch.device]:
        return {torch.device("cpu"), *(p.device for p in self.module.parameters())}


def check_policies(batch_norm: str, rng: str) -> None:
    """Raise ValueError unless both policies are known."""
    for name, value, known in (("batch_norm", batch_norm, BatchNormPolicy), ("rng", rng, RngPolicy)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {value!r}")


def _put(held: Iterable[tuple[_Place, Tensor]]) -> None:
    """Put buffers back where a layer has put a new tensor in their place instead of changing the old one."""
    for (holder, name), buffer in held:
        if holder.get(name) is not buffer:
            holder[name] = buffer


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _get_rng_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
