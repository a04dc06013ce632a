"""Processes that a launcher has started together, or started again, find one another."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed


def rejoin(timeout: timedelta, backend: str | None = None) -> None:
    """Make the process group, if torchrun has restarted this process after a failure; else do nothing.

    torchrun keeps the store in which the processes find one another, with the addresses of the processes that died: the
    new processes then wait for them (https://github.com/pytorch/pytorch/issues/135712). The new group therefore goes
    by names of its own in the store. Several nodes count their restarts apart, so they need torchrun's own way out:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.

    Args:
        timeout: time limit of the group's collective operations.
        backend: backend of the group; None for the backend of the devices.
    """
    env = os.environ
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1"
    if restarts == "0" or not shared or distributed.is_initialized():
        return
    store = distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout)  # type: ignore[attr-defined]
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"restart {restarts}", store),  # type: ignore[attr-defined]
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        timeout=timeout,
    )


def check_process_group() -> None:
    """Refuse processes that were launched together but would each train alone, and save over one another.

    Where there is no accelerator, transformers joins the processes only if it is told ``use_cpu``; else it just warns.

    Raises:
        ValueError: The processes would each train alone.
    """
    env = os.environ
    launched = int(env.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in env else 1
    device = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = env.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")  # set by accelerate launch --cpu
    if launched > 1 and not on_cpu and (device is None or device.type == "mps"):
        raise ValueError(
            f"{launched} processes were launched on a machine without accelerators, and each would train alone; to"
            " train together on CPUs, add --use_cpu true (use_cpu=True)"
        )
