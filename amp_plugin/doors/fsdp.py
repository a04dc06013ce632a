"""What accelerate's settings of FSDP have to be, so that the passes of a step can be exact."""

from __future__ import annotations

from typing import Any


def inexact_settings(accelerator: Any) -> str:
    """Return which setting cannot be exact, and what to use instead; nothing if FSDP2 is set up as it has to be."""
    if not accelerator.is_fsdp2:
        return "FSDP1; use FSDP2 (fsdp_version: 2) or DDP"
    from torch.distributed.fsdp import CPUOffloadPolicy

    if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        # The copies to the device do not wait for the host, which moves the weights between the passes.
        return "FSDP2 that offloads parameters to the CPU; leave fsdp_offload_params off"
    return ""
