"""Tensors whose memory is not free to be overwritten: others share it or hold it, or it serves several entries."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def clone_overlapping(lists: Sequence[list[Tensor]]) -> None:
    """Replace every dense tensor in the lists that overlaps another one, or itself as expanded ones do, by a copy.

    Autograd gives parameters that are added through views, ``p[None] + q[None]``, one gradient
    (https://github.com/pytorch/pytorch/issues/34082).
    """
    for ts in lists:
        for place, t in enumerate(ts):
            if 0 in t.stride():
                ts[place] = t.clone(memory_format=torch.contiguous_format)
    spans = sorted(
        (t.data_ptr(), t.nbytes, which, place)
        for which, ts in enumerate(lists)
        for place, t in enumerate(ts)
        if type(t) is not FakeTensor  # which has no memory
    )
    end = 0
    for start, size, which, place in spans:
        if size and start < end:
            lists[which][place] = lists[which][place].clone()
        end = max(end, start + size)


def overwritable_gradient(param: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, or a copy of it if anyone else holds that tensor; None if there is none."""
    held = _references_to_gradient(param) > _FREE
    return param.grad.clone() if held and param.grad is not None else param.grad


def _references_to_gradient(param: Tensor) -> int:
    return sys.getrefcount(param.grad)


def _with_gradient() -> Tensor:
    tensor = torch.zeros(())
    tensor.grad = torch.zeros(())
    return tensor


_FREE = _references_to_gradient(_with_gradient())  # counted, because it differs from one Python to another
