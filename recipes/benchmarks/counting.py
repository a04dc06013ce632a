"""Counts what a piece of code asks of the device: operators, host synchronisations, memory and communication."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These launch nothing: they change how memory is described, allocate it, or tell the profiler something.
NO_KERNELS = {
    "aten.alias.default",
    "aten.detach.default",
    "aten.empty_like.default",
    "aten.expand.default",
    "aten.permute.default",
    "aten.promote_types.default",
    "aten.select.int",
    "aten.slice.Tensor",
    "aten.t.default",
    "aten.unbind.int",
    "aten.unsqueeze.default",
    "aten.view.default",
    "aten.view.dtype",
    "aten.view_as_real.default",
    "profiler._record_function_enter_new.default",
    "profiler._record_function_exit._RecordFunction",
}
HOST_SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item")


def storages(tensors: Any) -> dict[int, int]:
    """Address and bytes of each storage behind the tensors in a structure."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tree_leaves(tensors)
        if isinstance(t, Tensor)
    }


# One launch of a `_foreach` operator takes so many tensors, by the number of lists, and so many blocks of numbers: the
# limits of ATen's MultiTensorApply.cuh with CUDA 13, a seventh before.
_TENSORS, _BLOCKS, _BLOCK = (770, 448, 336, 252, 210), 2240, 65536


def _launches(name: str, args: Any, result: Any) -> int:
    """Return how many kernels CUDA launches for a `_foreach` operator, see `can_use_fast_route` in ForeachUtils.h."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    tensors = [t for each in lists for t in each] + [a for a in args if isinstance(a, Tensor)]
    alike = all(len({(t.dtype, t.device) for t in each}) == 1 for each in lists)
    alike &= "_copy_" in name or len({t.dtype for t in tensors}) == 1
    rows = list(zip(*lists, strict=True))
    if not (alike and all(len({(t.shape, t.stride()) for t in row}) == 1 for row in rows)):
        return len(rows)
    if "_norm" in name:  # the parts of the sums are set to 0 before, and added up after
        return 1 + _batches(lists, 1) + math.ceil(len(rows) / _TENSORS[0])
    return _batches(lists, len(lists) + (result is not None and not name.split(".")[1].endswith("_")))


def _batches(lists: list[Any], depth: int) -> int:
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors, blocks = tensors + 1, blocks + math.ceil(tensor.numel() / _BLOCK)
        full, rest = divmod(blocks, _BLOCKS)
        if full:
            launches, tensors, blocks = launches + full, min(rest, 1), rest
        elif tensors == _TENSORS[depth - 1]:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + bool(blocks)


class CountCalls(TorchDispatchMode):
    """Counts the operators that are dispatched, the bytes of the storages that they create, and those they send.

    Attributes:
        calls: number of calls of each operator.
        launches: kernels that CUDA would launch, at least: a `_foreach` operator is one, or as many as its size takes,
            where all tensors of a list are alike and the lists match, else one a tensor.
        allocated: bytes of the storages that the operators create.
        communicated: bytes that they send.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.launches = 0
        self.allocated = 0
        self.communicated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        if str(func) not in NO_KERNELS:
            self.launches += _launches(str(func), args, result) if "_foreach" in str(func) else 1
        if str(func).startswith("c10d.") and (payload := [t for t in tree_leaves(args) if isinstance(t, Tensor)]):
            self.communicated += sum(t.numel() * t.element_size() for t in payload)
        before = storages((args, kwargs))
        self.allocated += sum(n for address, n in storages(result).items() if address not in before)
        return result

    @property
    def kernels(self) -> int:
        """Operators that launch something; a `_foreach` one counts once, however many tensors it treats."""
        return sum(n for name, n in self.calls.items() if name not in NO_KERNELS)

    @property
    def syncs(self) -> dict[str, int]:
        """Operators that make the host wait for the device."""
        return {name: n for name, n in self.calls.items() if any(s in name for s in HOST_SYNCS)}
