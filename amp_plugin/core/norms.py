"""L2 norms of tensors that may be spread over devices and processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from amp_plugin.core.sharding import global_norms, local_shard, split_of

LOW_PRECISION = (torch.float16, torch.bfloat16)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, as a real tensor in its storage; a lazy conjugate is a copy."""
    tensor = local_shard(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def entries_of(tensor: Tensor) -> Tensor:
    """Return a tensor, or the entries that a sparse one has, which share its memory."""
    return tensor._values() if tensor.is_sparse else tensor


def norm_dtype(device: torch.device) -> torch.dtype:
    """Return the type of the norms of float32 tensors: float64, but on MPS, which has none, and mostly on the CPU."""
    return torch.float32 if device.type in ("cpu", "mps") else torch.float64


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Return the L2 norm of each tensor, as one vector; its squares are summed so that they do not overflow."""
    device = tensors[0].device
    # On the CPU a sum in float32 is five times as quick, and the host sees an overflow without waiting.
    if device.type == "cpu" and not isinstance(tensors[0], FakeTensor):
        dtype = torch.float32 if tensors[0].dtype in LOW_PRECISION else None
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))
        if all(map(math.isfinite, norms.tolist())):
            return norms
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32 if device.type == "mps" else torch.float64))


def overall_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over vectors on one or several devices, as a 0-d tensor on the first vector's device."""
    device = norms[0].device
    together = torch.cat([n.to(device) for n in norms]) if len(norms) > 1 else norms[0]
    norm: Tensor = torch.linalg.vector_norm(together, dtype=None if device.type == "mps" else torch.float64)
    return norm


def all_true(flags: Sequence[Tensor]) -> Tensor:
    """Return a 0-d bool on the first flag's device, whether all 0-d bools are true."""
    device = flags[0].device
    return functools.reduce(torch.logical_and, [flag.to(device) for flag in flags])


def global_squared_norm(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the squared L2 norm over all entries of all tensors, 0-d; None if there is no tensor.

    A tensor that is split over processes counts as a whole, so all processes have to call this.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        plain = local_tensor(tensor)
        alike.setdefault((plain.device, plain.dtype, split_of(tensor)), []).append(tensor)
    norms = [global_norms(norms_of([local_tensor(t) for t in group]), split_of(group[0])) for group in alike.values()]
    return overall_norm(norms).square() if norms else None
