"""What a script that trains a timm task does, for hosts/test_timm_train_py.py: import it with `--device-modules`.

The script is not touched, and training goes the same way, but that an epoch's random numbers do not depend on those
before (so that a run can be continued), and that DDP, asked for devices by the script, works on the CPU. When it ends,
`AMP_PLUGIN_RECORD/<rank>.pt` has:

start: the weights when training begins.
end: the weights at the end.
batches: what the task was called with in training, each batch once.
calls: of the task in training.
moved: for each batch, how far the weights were from the clean ones in the last call with it.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageDataset
from timm.models import generate_default_cfgs, register_model
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def weights(task: Any) -> dict[str, Tensor]:
    model = unwrap_model(task.get_trainable_module())
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Recorder:
    """Of one task."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"batches": [], "moved": [], "calls": 0}
        self._task: nn.Module | None = None
        self._targets: Tensor | None = None
        self._clean: dict[str, Tensor] = {}
        atexit.register(self.save)

    def watch(self, kind: Any) -> None:
        forward = kind.forward

        def recorded(task: nn.Module, inputs: Any, targets: Tensor) -> Any:
            self.see(task, inputs, targets)
            return forward(task, inputs, targets)

        kind.forward = recorded

    def see(self, task: nn.Module, inputs: Any, targets: Tensor) -> None:
        now = weights(task)
        if self._task is None:
            self._task, self.facts["start"] = task, now
        if targets is not self._targets:
            self._targets, self._clean = targets, now
            self.facts["batches"].append((inputs.clone() if isinstance(inputs, Tensor) else None, targets.clone()))
            self.facts["moved"].append(0.0)
        self.facts["calls"] += 1
        self.facts["moved"][-1] = max(float((now[name] - p).norm()) for name, p in self._clean.items())

    def save(self) -> None:
        if self._task is not None:
            self.facts["end"] = weights(self._task)
        torch.save(self.facts, Path(os.environ["AMP_PLUGIN_RECORD"]) / f"{os.environ.get('RANK', '0')}.pt")


class OnAnyDevice(DistributedDataParallel):
    """The script names the device of a process, which DDP refuses if that is the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)


def recorded_teacher(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Random but always the same; the script wants its teachers pretrained."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=4, **size)
    return model


default_cfgs = generate_default_cfgs({"recorded_teacher": {}})
register_model(recorded_teacher)
torch.nn.parallel.DistributedDataParallel = OnAnyDevice
ImageDataset.set_epoch = lambda dataset, epoch: random_seed(epoch)  # the script calls it where there is one
recorder = Recorder()
for kind in (ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask):
    recorder.watch(kind)
