"""Counts what a piece of code asks of the device: operators, host synchronisations, memory and communication."""

from __future__ import annotations

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


def _are_batched(lists: list[Any]) -> bool:
    """Return whether CUDA treats lists of tensors in batches, see `can_use_fast_route` in ATen's ForeachUtils.h."""
    alike = all(len({(t.dtype, t.device) for t in tensors}) == 1 for tensors in lists)
    return alike and all(len({(t.shape, t.stride()) for t in row}) == 1 for row in zip(*lists, strict=True))


class CountCalls(TorchDispatchMode):
    """Counts the operators that are dispatched, the bytes of the storages that they create, and those they send.

    Attributes:
        calls: number of calls of each operator.
        launches: kernels that CUDA would launch, at least: a `_foreach` operator is one where all tensors of a list are
            alike and the lists match, else one a tensor.
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
            lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
            self.launches += len(lists[0]) if "_foreach" in str(func) and not _are_batched(lists) else 1
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
