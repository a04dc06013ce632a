"""Trains with baselines in several processes, for test_methods.py: the weights, and whether replicas agree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from leaving import leave
from method_problem import BATCH, IN_PROCESSES, trained
from torch import nn

folder = Path(sys.argv[1])
results = {}
for method, chosen in IN_PROCESSES.items():
    kwargs: dict[str, Any] = {**chosen, "per_device_train_batch_size": BATCH // 2, "ddp_backend": "gloo"}
    weights = nn.utils.parameters_to_vector(trained(folder, **kwargs).model.parameters()).detach()  # type: ignore[union-attr]
    replicas = [torch.empty_like(weights) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(replicas, weights)
    results[method] = weights, all(torch.equal(weights, other) for other in replicas)
if torch.distributed.get_rank() == 0:
    torch.save(results, folder / "weights.pt")
leave()
