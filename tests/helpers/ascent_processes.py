"""Trains with ascent policies in two processes, for test_ascent_processes.py; started as torchrun does.

Every process writes `<folder>/<rank>.pt`: by case what it has after each step.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ascent_doors import LOOPS, make, train_with_trainer
from ascent_reference import STEPS, Batch
from leaving import leave
from passes import takes_part
from problems import small_batches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WORLD, SIZE = 2, 8
POLICIES: list[tuple[str, str | None]] = [
    ("stale", None),
    ("momentum", None),
    ("every(3)", None),
    ("adaptive(-1.4)", None),
    ("subset(0.5)", None),
    ("split(0.25)", None),
    ("full", "norm"),
]
DOORS = ("closure", "passes", "attach", "fully_shard", "amp_backward", "AMPTrainer")
# A closure keeps its batch, and passes of one's own are synchronised by DDP like any other.
CASES = [(door, *policy) for policy in POLICIES for door in DOORS if door != "closure" or not takes_part(policy[0])]


def batches() -> list[list[Batch]]:
    """By step and process, in the order in which the Trainer's loader deals them out."""
    every = iter(small_batches(STEPS * WORLD, SIZE, torch.float64))
    return [[next(every) for _ in range(WORLD)] for _ in range(STEPS)]


def shard(net: torch.nn.Module) -> None:
    """As each process holds a part of every parameter; the BatchNorm stays that of each process's batch."""
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    assert all(isinstance(p, DTensor) for p in net.parameters())


def trajectory(door: str, ascent: str, parameters: str | None) -> dict[str, Any]:
    if door == "AMPTrainer":
        options = {"per_device_train_batch_size": SIZE, "gradient_accumulation_steps": 1, "ddp_backend": "gloo"}
        seen = train_with_trainer(ascent, parameters, batches(), **options)
        return {"weights": seen.weights, "passes": seen.passes}
    sharded = door == "fully_shard"
    net, amp = make(ascent, parameters, shard if sharded else lambda net: None)
    if sharded:
        step = LOOPS["attach"](net, amp)
    else:  # accelerate wraps the net itself
        step = LOOPS[door](net if door == "amp_backward" else DistributedDataParallel(net), amp)
    weights, passes = [], []
    for of_ranks in batches():
        step([of_ranks[dist.get_rank()]])
        whole = {name: p.full_tensor() if sharded else p for name, p in net.named_parameters()}
        weights.append({name: p.detach().clone() for name, p in whole.items()})
        passes.append(amp.passes)
    return {"weights": weights, "passes": passes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    torch.save({case: trajectory(*case) for case in CASES}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
