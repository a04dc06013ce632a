"""What the processes of a job have to agree on before the weights are perturbed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def in_process_group() -> bool:
    """Whether this is one of several processes that talk to each other."""
    return dist.is_available() and dist.is_initialized()


def data_parallel(module: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper in the module, or the one whose forward pass the module is being called from."""
    if not in_process_group():
        return None
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            return child
    active: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return active


def average_gradients(params: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace gradients by their mean over the processes, as DDP would; a missing one counts as zero.

    The processes must agree on the parameters, but not on which of them received a gradient.
    """
    grads = _gradients(params)
    torch._foreach_div_(grads, dist.get_world_size(group))
    for work in [dist.all_reduce(g, group=group, async_op=True) for g in grads]:
        work.wait()


def share_overflow(params: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """If one process's gradients are not finite, make those of all NaN, or the replicas would part.

    To be called before the ascent where each process perturbs along its own gradient, by all processes. Only whether
    they are finite is shared: otherwise the gradients stay each process's own. A missing one becomes zero.

    Args:
        params: the optimizer's parameters that require gradients.
        group: of the replicas; None for all processes.
    """
    if not in_process_group():
        return
    grads = _gradients(params)
    sizes = torch._foreach_norm([g for g in grads if g.numel()], torch.inf)  # unlike L2 norms, these cannot overflow
    taint = torch.stack([size.float() for size in sizes]).sum() * 0.0  # NaN if any entry is NaN or infinite
    dist.all_reduce(taint, group=group)
    torch._foreach_add_(grads, taint)  # all of them: any one may belong to a group that is not perturbed


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    grads = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    return grads
