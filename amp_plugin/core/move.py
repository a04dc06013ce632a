"""The move to theta + delta: each step is multiplied by a factor of its own and added to its weight, or left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from amp_plugin.core.warn import warn_user

# The integer type by size in bytes. A float's bits, read as an integer and multiplied by 0, clear even NaN and inf.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Where a kernel takes lists of tensors, but no list of numbers on the device, and what it costs to write such a number
# out as a tensor is less than a kernel of its own.
_WRITES_OUT = ("cuda",)
_SMALL = 4096


def move(params: list[Tensor], steps: list[Tensor], factors: Tensor, finite: Tensor) -> None:
    """Add ``step * factor`` to each parameter, in place, or 0 if the steps are not finite; the steps are overwritten.

    CUDA launches three kernels for all tensors together. With a factor for each tensor it launches one more for each of
    more than 4,096 numbers, and two more for all others.

    Args:
        params: parameters, all of one type.
        steps: a tensor of the same shape for each parameter, all of one type.
        factors: a number for each parameter, or one for all of them, 0-d; anything where the steps are not finite.
        finite: 0-d bool, whether the parameters move at all.
    """
    _multiply(steps, factors)
    bits = _BITS[steps[0].element_size()]
    torch._foreach_mul_([step.view(bits) for step in steps], finite.to(bits))  # 0 times NaN would be NaN
    torch._foreach_add_(params, steps)


def _multiply(steps: list[Tensor], factors: Tensor) -> None:
    """Multiply all steps by one factor, 0-d, or each by its own."""
    if factors.dim() == 0:
        torch._foreach_mul_(steps, factors)
        return
    writes_out = steps[0].device.type in _WRITES_OUT and steps[0].dtype == factors.dtype
    owners = [i for i, step in enumerate(steps) if writes_out and step.numel() <= _SMALL and step.is_contiguous()]
    if owners:
        small = [steps[i] for i in owners]
        index = _repeated(tuple(owners), tuple(map(torch.numel, small)), factors.device)
        written_out: Any = _unflatten_dense_tensors(factors.index_select(0, index), small)  # type: ignore[no-untyped-call]
        torch._foreach_mul_(small, written_out)
    if rest := sorted({*range(len(steps))}.difference(owners)):
        each = factors.unbind()
        torch._foreach_mul_([steps[i] for i in rest], [each[i] for i in rest])


@functools.cache
def _repeated(numbers: tuple[int, ...], times: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a vector on the device that has each number so many times; it is kept for ever, as CUDA graphs do."""
    return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(times)).to(device)


class CompiledMove:
    """The function :func:`move` as `torch.compile` makes it: one kernel for some 35 tensors, read and written once.

    The kernels are those of the lists of tensors that were given; other lists are compiled anew, which takes seconds.
    If the compiler fails, that is told once, and :func:`move` is called from then on. The steps are not overwritten.
    """

    def __init__(self) -> None:
        self._compiles = True

    def __call__(self, params: list[Tensor], steps: list[Tensor], factors: Tensor, finite: Tensor) -> None:
        """Add ``step * factor`` to each parameter as :func:`move` does."""
        if self._compiles:
            try:
                _compiled()(params, steps, factors, finite)
                return
            except Exception as error:  # before anything moved: that comes last in what is compiled
                self._compiles = False
                lines = str(error).strip().splitlines() or [""]
                warn_user(f"AMP: torch.compile failed, so the move is not compiled. {type(error).__name__}: {lines[0]}")
        move(params, steps, factors, finite)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_move_in_one_expression, dynamic=False)


def _move_in_one_expression(params: list[Tensor], steps: list[Tensor], factors: Tensor, finite: Tensor) -> None:
    each = factors.unbind() if factors.dim() else [factors] * len(steps)
    added = [torch.where(finite, step * factor, 0.0) for step, factor in zip(steps, each, strict=True)]
    torch._foreach_add_(params, added)  # one list, for which the compiler makes one kernel
