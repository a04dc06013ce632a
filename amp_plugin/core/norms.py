"""L2 norms of tensors, and of the parts of them that this process holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amp_plugin.core.sharding import global_norms, local_shard, split_of

LOW_PRECISION = (torch.float16, torch.bfloat16)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, as a real one in the same storage; a lazily conjugated one is conjugated."""
    tensor = local_shard(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def norms_of(tensors: list[Tensor]) -> Tensor:
    """L2 norm of each tensor, as one vector; half precision is summed in float32, which cannot overflow."""
    dtype = torch.float32 if tensors[0].dtype in LOW_PRECISION else None
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def overall_norm(norms: Sequence[Tensor]) -> Tensor:
    """L2 norm over all vectors, which may live on several devices; on the first one's device."""
    device = norms[0].device
    together = torch.cat([n.to(device) for n in norms]) if len(norms) > 1 else norms[0]
    norm: Tensor = torch.linalg.vector_norm(together)
    return norm


def all_finite(norms: Sequence[Tensor]) -> Tensor:
    """0-d bool: no NaN and no infinity in any vector (each entry is >= 0, so one sum tells)."""
    device = norms[0].device
    finite: Tensor = sum((n.sum().to(device) for n in norms[1:]), norms[0].sum()) < torch.inf
    return finite


def global_squared_norm(tensors: Sequence[Tensor]) -> Tensor | None:
    """Squared L2 norm over all entries of all tensors, 0-d; None if there are none.

    Of tensors that are split over processes the whole ones count, so all processes have to call this.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        plain = local_tensor(tensor)
        alike.setdefault((plain.device, plain.dtype, split_of(tensor)), []).append(tensor)
    norms = [global_norms(norms_of([local_tensor(t) for t in group]), split_of(group[0])) for group in alike.values()]
    return overall_norm(norms).square() if norms else None
