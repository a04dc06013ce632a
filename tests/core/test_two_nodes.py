"""Two torchrun agents, as on two machines, with one process each: data-parallel training equals one process."""

from __future__ import annotations

from pathlib import Path

import torch
from launch import start_torchrun
from reference import amp_trajectory
from sharded_training import BALL, NORMS, SGD_ARGS, Net, batches, mean_loss
from torch.distributed import TCPStore


def test_two_nodes_equal_one_process(tmp_path: Path) -> None:
    # The agents meet at a store that is here, so its port is taken from the first moment on.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--local-addr", "127.0.0.1", "--rdzv-id", "amp"]
    options += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{store.port}",
        "--rdzv-conf",
        "is_host=0,join_timeout=120",
    ]
    agents = [start_torchrun("two_nodes.py", tmp_path, options=options) for _ in range(2)]
    assert [agent.wait() for agent in agents] == [0, 0]
    facts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [f["place"] for f in facts] == [{"GROUP_RANK": r, "LOCAL_RANK": 0, "WORLD_SIZE": 2} for r in range(2)]
    for norm in NORMS:
        ball = {**BALL, "norm": norm, "inner_iter": 2}
        last = amp_trajectory(Net(), mean_loss, batches(), **ball, **SGD_ARGS)[-1].params
        for in_buckets in (False, True):
            first, second = (f["weights"][f"{norm}, {in_buckets}"] for f in facts)
            for name, tensor in last.items():
                torch.testing.assert_close(first[name], tensor, rtol=1e-10, atol=1e-10)
                assert torch.equal(first[name], second[name])
