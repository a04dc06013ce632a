"""Trains in the way of timm's train.py, with timm's own parts, for hosts/test_timm_tasks.py; also run by torchrun.

There every process writes what it saw to `<folder>/<rank>.pt`. The batches, and the groups of micro-batches that share
a perturbation, are here as well, for the reference that the weights are compared with.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from leaving import leave
from problems import parameters_of, small_batches, small_net
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch import distributed as dist
from windows import Batch, Groups

import amp_plugin  # noqa: F401 # the only word of it in a script

Facts = dict[str, list[Any]]  # of each step: weights, their average, the loss scale

BALL: dict[str, Any] = {"epsilon": 0.03, "inner_lr": 0.1, "inner_iter": 2}
SGD_ARGS: dict[str, Any] = {"lr": 0.2, "momentum": 0.9}  # timm makes the momentum Nesterov's
WEIGHT_DECAY = 1e-2  # timm spares vectors, and what the model's `no_weight_decay()` names
STEPS, OVERFLOW_AT, SCALE = 10, 4, 256.0
EMA_DECAY, TEMPERATURE, TASK_WEIGHT = 0.5, 2.0, 0.3
CLIP = {"norm": 0.3, "value": 0.02, "agc": 0.05}


@dataclass(frozen=True)
class Case:
    """What a training is like.

    Attributes:
        kind: of task; for distillation there is a frozen teacher beside the model.
        accumulation: micro-batches of a step; the last step has one less, if there are several.
        dtype: of the weights.
        autocast: to this type, or no mixed precision.
        scaled: with timm's gradient scaler.
        clip: timm's mode of gradient clipping.
        mixup: mixed images and soft targets.
        backend: of `torch.compile`, or not compiled.
        bad_pass: which pass of a step has an infinite loss, in the last process; -1 for none.
        world: processes.
    """

    kind: Literal["classification", "distillation"] = "classification"
    accumulation: int = 1
    dtype: torch.dtype = torch.float64
    autocast: torch.dtype | None = None
    scaled: bool = False
    clip: Literal["norm", "value", "agc"] | None = None
    mixup: bool = False
    backend: str | None = None
    bad_pass: int = -1
    world: int = 1


def student(case: Case, **kwargs: Any) -> nn.Module:
    """A vision transformer for 3x8x8 images; it has no kinks, where small errors would grow."""
    torch.manual_seed(0)
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4, **kwargs}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **kwargs)
    return model.to(case.dtype)


def teacher(case: Case) -> nn.Module:
    return small_net(case.dtype, seed=3).eval()


def windows_of(case: Case, rank: int) -> list[list[Batch]]:
    """The micro-batches of each step, in one process."""
    k = case.accumulation
    batches = small_batches(case.world * (STEPS * k - (k > 1)), dtype=case.dtype)[rank :: case.world]
    if case.mixup:
        np.random.seed(rank)  # what timm draws from
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
        batches = [mixup(x, y) for x, y in batches]
    return [batches[i : i + k] for i in range(0, len(batches), k)]


def groups_of(case: Case) -> list[Groups]:
    """For each step those micro-batches together that share a perturbation: one of each process."""
    of_ranks = (windows_of(case, rank) for rank in range(case.world))
    return [list(zip(*windows, strict=True)) for windows in zip(*of_ranks, strict=True)]


class Criterion(nn.Module):
    """timm's, but infinite in one call."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion, self.calls, self.bad_call = criterion, 0, -1

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        loss: Tensor = self.criterion(outputs, targets)
        return loss * torch.inf if self.calls - 1 == self.bad_call else loss


class Training:
    """A model, its optimizer, its task, and a loop over micro-batches in one of the processes."""

    def __init__(self, case: Case, opt: str = "amp", *, optimizer_first: bool = False, **model_args: Any) -> None:
        self.case = case
        self.facts: Facts = {"weights": [], "ema": [], "scales": []}
        self.criterion = Criterion(SoftTargetCrossEntropy() if case.mixup else LabelSmoothingCrossEntropy(0.1))
        model = student(case, **model_args)
        if optimizer_first:
            self.optimizer = self._optimizer(model, opt)
            self.task = self._task(model)
        else:
            self.task = self._task(model)
            self.optimizer = self._optimizer(model, opt)
        self.scaler = NativeScaler("cpu") if case.scaled else None
        if self.scaler:
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": SCALE})
        self.task.setup_ema(decay=EMA_DECAY)
        if case.backend:
            self.task.compile(backend=case.backend)
        if case.world > 1:
            self.task.prepare_distributed()

    def _task(self, model: nn.Module) -> TrainingTask:
        args: dict[str, Any] = {"criterion": self.criterion, "dtype": self.case.dtype, "verbose": False}
        if self.case.kind == "classification":
            return ClassificationTask(model, **args)
        args |= {"temperature": TEMPERATURE, "task_loss_weight": TASK_WEIGHT}
        return LogitDistillationTask(model, teacher(self.case), **args)

    def _optimizer(self, model: nn.Module, opt: str) -> Any:
        ball = {} if opt == "sgd" else BALL
        return create_optimizer_v2(model, opt, weight_decay=WEIGHT_DECAY, **SGD_ARGS, **ball)

    def train(self, windows: Iterable[list[Batch]]) -> Facts:
        for window in windows:
            self.step(window)
        return self.facts

    def step(self, window: list[Batch]) -> None:
        """Accumulate the gradients of some micro-batches, and update."""
        last_process = self.case.world == 1 or dist.get_rank() + 1 == self.case.world
        if self.case.bad_pass >= 0 and len(self.facts["weights"]) == OVERFLOW_AT and last_process:
            self.criterion.bad_call = self.criterion.calls + self.case.bad_pass
        for i, batch in enumerate(window):
            update = i + 1 == len(window)
            with nullcontext() if update else self.task.no_sync():
                self._backward(self._loss(batch, len(window)), update)
        self.optimizer.zero_grad()
        self.task.update_ema()
        self.facts["weights"].append(self.weights())
        self.facts["ema"].append(parameters_of(self.task.get_trainable_module(ema=True).module))
        self.facts["scales"].append(self.scaler.state_dict()["scale"] if self.scaler else None)

    def _loss(self, batch: Batch, micro_batches: int) -> Tensor:
        with torch.autocast("cpu", self.case.autocast, enabled=self.case.autocast is not None):
            loss: Tensor = self.task(*batch)["loss"]
        if micro_batches > 1:
            loss /= micro_batches  # in place
        return loss

    def _backward(self, loss: Tensor, update: bool) -> None:
        mode = self.case.clip
        clipped = self.task.get_clip_parameters(exclude_head=mode == "agc") if mode else None
        if self.scaler:
            clip = {"clip_grad": CLIP[mode], "clip_mode": mode} if mode else {}
            self.scaler(loss, self.optimizer, parameters=clipped, need_update=update, **clip)
            return
        loss.backward()
        if update:
            if mode:
                dispatch_clip_grad(clipped, CLIP[mode], mode)
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return parameters_of(unwrap_model(self.task.get_trainable_module()))

    def saver(self, folder: Path) -> CheckpointSaver:
        return CheckpointSaver(
            model=self.task.get_trainable_module(),
            optimizer=self.optimizer,
            args=Namespace(model="vit_tiny_patch16_224"),
            amp_scaler=self.scaler,
            checkpoint_dir=str(folder),
            task=self.task,
        )


OF_TWO_PROCESSES = {
    "plain": Case(world=2),
    "accumulation": Case(world=2, accumulation=3, clip="norm"),
    "distillation": Case(world=2, kind="distillation", accumulation=2),
    "compiled": Case(world=2, accumulation=2, backend="aot_eager"),
    **{f"overflow in pass {i}": Case(world=2, scaled=True, bad_pass=i) for i in range(BALL["inner_iter"] + 1)},
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    facts = {name: Training(c).train(windows_of(c, dist.get_rank())) for name, c in OF_TWO_PROCESSES.items()}
    torch.save(facts, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
