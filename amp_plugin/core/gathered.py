"""What FSDP (`torch.distributed.fsdp.fully_shard`) keeps in a module from one pass to the next.

FSDP gathers the weights for a forward pass and may keep them until the end of its backward pass. So if that backward
pass never comes (an evaluation, an exception, a loss that is only looked at), a module can go on with gathered weights
that its parameters have moved away from. Gradients that are not synchronised yet are kept outside ``.grad``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from amp_plugin.core.distributed import in_process_group
from amp_plugin.core.module_parts import parts_of


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to the module itself."""
    return hasattr(type(module), "set_requires_gradient_sync")  # to ask the module takes torch four times as long


def gather_anew(module: nn.Module) -> None:
    """Let FSDP forget the weights that it has gathered, because the weights have moved."""
    for part in _fully_sharded_parts(module):
        part.reshard()


def forget_pass(module: nn.Module) -> None:
    """Let FSDP forget the weights and the gradients of a window of passes that has not come to its end."""
    parts = _fully_sharded_parts(module)
    for root in parts[:1]:
        if root._get_fsdp_state()._is_root and hasattr(root, "reset_iter_state"):  # or a forward pass would go on
            root.reset_iter_state()
    states = [part._get_fsdp_state() for part in parts]
    groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g]
    for group in groups:
        group._to_sharded()
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def _fully_sharded_parts(module: nn.Module) -> list[Any]:
    return [part for part in parts_of(module) if is_fully_sharded(part)] if in_process_group() else []
