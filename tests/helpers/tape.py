"""Record and replay of operators on a CPU, as CUDA captures and replays kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Tape(TorchDispatchMode):
    """Notes the operators of a step, as a CUDA graph does, and undoes what they did; `replay` makes them again.

    They read and write the memory that they did while noted. Whatever else Python did is not repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name in ("running_mean", "running_var"):  # which batch norm does not declare
                for tensor in tree_leaves(value):
                    if _place(tensor) not in self.made:
                        self.before.setdefault(_place(tensor), (tensor, tensor.clone()))
        out = func(*args, **kwargs)
        known = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.made |= {_place(t) for t in tree_leaves(out) if isinstance(t, Tensor)} - known
        # An operator may give a tensor another shape later.
        self.calls.append((func, *(tree_map_only(Tensor, Tensor.detach, part) for part in (args, kwargs, out))))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def on_tape(step: Callable[[], Any], stream: Any = None) -> tuple[Callable[[], Any], Any]:
    tape = Tape()
    try:
        with tape:
            result = step()
    finally:
        with torch.no_grad():
            for tensor, value in tape.before.values():
                tensor.detach().copy_(value)
    return tape.replay, result
