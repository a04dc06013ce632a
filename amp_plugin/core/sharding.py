"""Parameters that are spread over processes: what `torch.distributed.fsdp.fully_shard` and tensor parallelism make.

Such a parameter is a DTensor: every process holds a part, perhaps an empty one. Displacing it, backing it up and
putting it back concern each part alone; only its norm is a matter of all. They are told by their attributes, because
importing `torch.distributed.tensor` takes up to a second, and whoever uses it has imported it.

Gradients must be synchronised before they come here, as FSDP does in each backward pass. Parameters that other
processes hold altogether (pipeline stages) are unknown here: each stage has balls, and a finite flag, of its own.

FSDP gathers the weights for a forward pass and may keep them until the end of its backward pass. So if that backward
pass never comes (an exception, a loss that is only looked at), a module can go on with gathered weights at
theta + delta although its parameters are at theta; ``module.reset_iter_state()`` or ``reshard()`` makes it gather anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Between which processes tensors are split: those along some dimensions of a mesh.

    Attributes:
        mesh: a `torch.distributed.device_mesh.DeviceMesh`.
        dims: its dimensions that split; along the others there are replicas.
    """

    mesh: Any
    dims: tuple[int, ...]


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "device_mesh")


def split_of(tensor: Any) -> Split | None:
    """How a tensor is split between processes; None if each has all of it, as with any plain tensor.

    Raises:
        RuntimeError: its parts are terms of a sum that is still to be taken.
    """
    if not is_distributed(tensor):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(f"AMP cannot perturb a parameter that is a pending sum, placements {tensor.placements}")
    dims = tuple(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return Split(tensor.device_mesh, dims) if dims else None


def local_shard(tensor: Any) -> Tensor:
    """What this process holds of a tensor, in the same storage; the tensor itself if it is a plain one."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part


def redistribute_like(tensor: Any, param: Any) -> Tensor:
    """A gradient split as its parameter is: tensor parallelism may leave it as a pending sum, for example.

    If it is split otherwise, all processes of the mesh have to call this, and the result is a copy.
    """
    if is_distributed(tensor) and tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    same: Tensor = tensor
    return same


def global_norms(norms: Tensor, split: Split | None) -> Tensor:
    """L2 norms of whole tensors, shape (tensors,), from those of the parts that this process holds.

    One collective for each dimension that splits, which all processes of the mesh have to enter; every process gets
    the same result, so a NaN in one part is seen by all. It overflows only where the norm in one process would.
    """
    if split is None:
        return norms
    squares = norms.square()
    for dim in split.dims:
        torch.distributed.all_reduce(squares, group=split.mesh.get_group(dim))
    return squares.sqrt()
