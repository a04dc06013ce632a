"""What the processes of a job have to agree on before the weights are perturbed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def in_process_group() -> bool:
    """Return whether this is one of several processes that talk to each other."""
    return dist.is_available() and dist.is_initialized()


def data_parallel(module: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper in a module, or the one that is calling it in its forward pass; None if there is none."""
    if not in_process_group():
        return None
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            return child
    active: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return active


def average_gradients(params: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace gradients by their mean over the processes, as DDP would; a missing gradient counts as zero.

    The processes must agree on the parameters, but not on which of them received a gradient.

    Args:
        params: parameters that require gradients.
        group: processes that hold replicas; default None, all processes.
    """
    grads = _gradients(params)
    torch._foreach_div_(grads, dist.get_world_size(group))
    for work in [dist.all_reduce(g, group=group, async_op=True) for g in grads]:
        work.wait()


def share_overflow(params: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Make the gradients of all processes NaN if one process's are not finite, or else the replicas would part.

    All processes call this before the ascent, where each perturbs along its own gradient. Only whether gradients are
    finite is shared: otherwise they stay each process's own. A missing gradient becomes zero.

    Args:
        params: parameters of the optimizer that require gradients.
        group: processes that hold replicas; default None, all processes.
    """
    if not in_process_group():
        return
    grads = _gradients(params)
    sizes = torch._foreach_norm([g for g in grads if g.numel()], torch.inf)  # unlike L2 norms, these cannot overflow
    torch._foreach_mul_(sizes, 0.0)  # NaN where an entry is NaN or infinite
    taint = torch.stack([size.float() for size in sizes]).sum()
    dist.all_reduce(taint, group=group)
    torch._foreach_add_(grads, taint)  # all of them: any one may belong to a group that is not perturbed


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    grads = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    return grads
