"""Tensors that share memory, which in-place kernels would change several times."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def clone_overlapping(lists: Sequence[list[Tensor]]) -> None:
    """Replace every dense tensor in the lists that overlaps another one by a copy.

    Autograd gives parameters that are added through views, ``p[None] + q[None]``, one gradient
    (https://github.com/pytorch/pytorch/issues/34082).
    """
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
