"""Tell how a run was really computed, from the Trainer and the data rather than from what was asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from amp_plugin.data.splits import LabelledSplit
from amp_plugin.train.trainer import RecipeTrainer

_ROWS = 1000  # of images or texts that a fingerprint reads


def execution(trainer: RecipeTrainer, data: Mapping[str, LabelledSplit]) -> dict[str, Any]:
    """Describe a training that has ended: machine, arithmetic, batch, optimizer, schedule and data."""
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
        "data": {name: fingerprint(split) for name, split in data.items()},
    }


def fingerprint(split: LabelledSplit) -> str:
    """Return a hash of all labels, and of a thousand images or texts spread evenly."""
    digest = hashlib.sha256()
    for name, array in vars(split).items():
        rows = array if name == "labels" else array[:: max(1, len(array) // _ROWS)]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(repr(rows.tolist()).encode() if rows.dtype.hasobject else np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()[:16]


def _optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the names of an optimizer and of those that it wraps, and the arguments of its first parameter group."""
    names, inner = [], optimizer
    while inner is not None:
        names.append(type(inner).__name__)
        inner = next((o for o in vars(inner).values() if isinstance(o, Optimizer)), None)
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return {"classes": names, **{n: v.item() if isinstance(v, torch.Tensor) else v for n, v in group.items()}}
