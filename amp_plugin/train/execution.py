"""Tell how a run was really computed, from the Trainer and the data rather than from what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from amp_plugin.train.trainer import RecipeTrainer


def execution(trainer: RecipeTrainer, data: Mapping[str, str]) -> dict[str, Any]:
    """Describe a training that has ended: machine, arithmetic, batch, optimizer, schedule and hashes of the data."""
    args = trainer.args
    device = trainer.accelerator.device
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": trainer.accelerator.num_processes,
        "precision": trainer.accelerator.mixed_precision,
        "effective_batch": batch,
        "steps": trainer.state.global_step,
        "optimizer": _optimizer(trainer.optimizer),
        "scheduler": type(trainer.lr_scheduler).__name__,
        "data": dict(data),
    }


def execution_in_words(made: Mapping[str, Any]) -> str:
    """Tell where and in which arithmetic a run was computed, in one phrase."""
    processes, threads = made["processes"], made["threads"]
    parts = [made["device"] if processes == 1 else f"{made['device']} in {processes} processes"]
    if made["device"] == "cpu":
        parts.append(f"{threads} thread{'s' if threads > 1 else ''}{' each' if processes > 1 else ''}")
    return ", ".join([*parts, {"no": "fp32"}.get(made["precision"], f"{made['precision']} mixed precision")])


def _optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the names of an optimizer and of those that it wraps, and the arguments of its first parameter group."""
    names, inner = [], optimizer
    while inner is not None:
        names.append(type(inner).__name__)
        inner = next((o for o in vars(inner).values() if isinstance(o, Optimizer)), None)
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return {"classes": names, **{n: v.item() if isinstance(v, torch.Tensor) else v for n, v in group.items()}}
