"""Saves and loads `torch.distributed.checkpoint`s of sharded training, for test_distributed_checkpoint.py.

`distributed_checkpoint.py <folder> save` trains for half of the steps and saves; `... load <n>` trains the other half
from what n processes have saved. Both may be given. Each process of a load writes the weights at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from leaving import leave
from sharded_training import PATIENCE, STEPS, Case, Kind, Run, batches
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

HALF = STEPS // 2


def cases(kind: Kind) -> dict[str, Case]:
    return {
        "sgd": Case("tensor", 2, kind, groups=True),
        "adamw": Case("global", 1, kind, base="AdamW"),
    }


def options_for(name: str) -> StateDictOptions:
    """Both ways to name the optimizer's options: by group, and by parameter."""
    return StateDictOptions(flatten_optimizer_state_dict=name == "adamw")


def train_and_save(folder: Path, kind: Kind) -> None:
    for name, case in cases(kind).items():
        run = Run(case)
        for batch in batches()[:HALF]:
            run.step(batch)
        model, optimizer = get_state_dict(run.net, run.optimizer, options=options_for(name))
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / name)


def load_and_train(folder: Path, kind: Kind) -> dict[str, dict[str, Tensor]]:
    """The weights at the end, for each case."""
    ends = {}
    for name, case in cases(kind).items():
        run = Run(case)
        with torch.no_grad():
            for group in run.optimizer.param_groups:  # so that nothing can be right before it is loaded
                group.update(lr=9.0, epsilon=9.0, inner_lr=9.0, weight_decay=9.0)
                for p in group["params"]:
                    p.zero_()
        options = options_for(name)
        model, optimizer = get_state_dict(run.net, run.optimizer, options=options)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder / name)
        set_state_dict(
            run.net,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        for batch in batches()[HALF:]:
            run.step(batch)
        ends[name] = run.weights()
    return ends


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=PATIENCE)
    root, world, arguments = Path(sys.argv[1]), dist.get_world_size(), sys.argv[2:]
    if "save" in arguments:
        train_and_save(root / f"saved by {world}", "fsdp")
    if "load" in arguments:
        saved_by = arguments[arguments.index("load") + 1]
        weights = load_and_train(root / f"saved by {saved_by}", "fsdp")
        torch.save(weights, root / f"{saved_by} to {world}, process {dist.get_rank()}.pt")
    leave()
