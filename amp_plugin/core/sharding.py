"""Parameters that are spread over processes, as `torch.distributed.fsdp.fully_shard` and tensor parallelism make them.

Such a parameter is a DTensor: every process holds a part, perhaps an empty one. To displace a parameter, to back it up
and to put it back concerns each part alone; only the norm is a matter of all processes. DTensors are told by an
attribute, because importing `torch.distributed.tensor` takes up to a second, and whoever uses it has imported it.

Gradients must be synchronised before they come here, as FSDP does in each backward pass. Parameters that other
processes hold altogether (pipeline stages) are unknown here: each stage has balls and a finite flag of its own.

FSDP gathers the weights for a forward pass and may keep them, see `gathered.py`, which the doors that know the module
look after. In a loop of one's own ``module.reset_iter_state()`` or ``reshard()`` makes the module gather anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """The processes that tensors are split between, along some dimensions of a mesh.

    Attributes:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
        dims: dimensions of the mesh that split; along the other dimensions there are replicas.
    """

    mesh: Any
    dims: tuple[int, ...]


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def split_of(tensor: Any) -> Split | None:
    """Return how a tensor is split between processes; None if each has all of it, as with any plain tensor.

    Raises:
        RuntimeError: the parts of the tensor are terms of a sum that is still to be taken.
    """
    if not is_distributed(tensor):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(f"AMP cannot perturb a parameter that is a pending sum, placements {tensor.placements}")
    dims = tuple(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return Split(tensor.device_mesh, dims) if dims else None


def local_shard(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor, in the same storage; a plain tensor is returned as it is."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part


def redistribute_like(tensor: Any, param: Any) -> Tensor:
    """Return a gradient split as its parameter is; tensor parallelism may leave it as a pending sum, for example.

    Where a gradient is split otherwise, all processes of the mesh have to call this, and the result is a copy.
    """
    if is_distributed(tensor) and tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    same: Tensor = tensor
    return same


def global_norms(norms: Tensor, split: Split | None) -> Tensor:
    """Return the L2 norms of whole tensors, shape (tensors,), from the norms of the parts that this process holds.

    Each dimension that splits costs one collective, which all processes of the mesh have to enter. Every process gets
    the same result, so a NaN in one part is seen by all.
    """
    if split is None:
        return norms
    squares = norms.double().square()  # of one type in all processes, whose own norms need not be; and no overflow
    for dim in split.dims:
        torch.distributed.all_reduce(squares, group=split.mesh.get_group(dim))
    return squares.sqrt()
