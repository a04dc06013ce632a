"""Trains with `DistributedDataParallel` as one process of one of two nodes, for test_two_nodes.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from leaving import leave
from sharded_training import BALL, NORMS, PATIENCE, SGD_ARGS, Net, batches, mean_loss
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from amp_plugin import AMP


def train(norm: str, gradients_in_buckets: bool) -> dict[str, Tensor]:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=gradients_in_buckets)
    optimizer = AMP(model.parameters(), **BALL, **SGD_ARGS, norm=norm, inner_iter=2)
    for batch in batches():
        inputs, targets = (t.tensor_split(dist.get_world_size())[dist.get_rank()] for t in batch)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = mean_loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return {name: p.detach() for name, p in net.named_parameters()}


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=PATIENCE)
    place = {name: int(os.environ[name]) for name in ("GROUP_RANK", "LOCAL_RANK", "WORLD_SIZE")}
    weights = {f"{norm}, {in_buckets}": train(norm, in_buckets) for norm in NORMS for in_buckets in (False, True)}
    torch.save({"place": place, "weights": weights}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
