"""Trains a small net in raw accelerate loops, for hosts/test_accelerate.py; started as torchrun does.

Every process writes what it saw to `<folder>/<rank>.pt`. The data, and the groups of micro-batches that share a
perturbation, are here as well, for the reference that the weights are compared with.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from leaving import leave
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from windows import Batch, Groups

from amp_plugin import AMP, LossModule, amp_backward, attach

WORLD, STEPS, SIZE, INNER_ITER, OVERFLOW_AT = 2, 10, 4, 2, 3
BALL: dict[str, Any] = {"epsilon": 0.1, "inner_lr": 0.3, "inner_iter": INNER_ITER}
SGD_ARGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
CLIP = 0.5

Door = Literal["attach before prepare()", "attach after prepare()", "amp_backward"]
DOORS: tuple[Door, ...] = ("attach before prepare()", "attach after prepare()", "amp_backward")


@dataclass(frozen=True)
class Case:
    """`bad_pass`: which pass of a step has an infinite loss in the last process; -1 for none."""

    door: Door
    sync: bool
    micro_batches: int = 1
    bad_pass: int = -1
    scaled: bool = False


CASES = [
    *(Case(d, s, k) for d in DOORS for s in (True, False) for k in (1, 3)),
    *(Case(d, s, bad_pass=i) for d in DOORS for s in (True, False) for i in range(INNER_ITER)),
    *(Case(d, s, bad_pass=i, scaled=True) for d in DOORS for s in (True, False) for i in range(INNER_ITER + 1)),
]


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples = STEPS * case.micro_batches * WORLD * SIZE
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def groups_of(case: Case, step: int) -> Groups:
    """accelerate gives the processes a batch each in turn."""
    batches: list[Batch] = list(zip(*(t.split(SIZE) for t in data(case)), strict=True))
    micro_batches = [batches[i : i + WORLD] for i in range(0, len(batches), WORLD)]  # those of the processes
    window = micro_batches[step * case.micro_batches : (step + 1) * case.micro_batches]
    if case.door == "amp_backward":
        of_ranks = list(zip(*window, strict=True))
        return [[batch for batches in of_ranks for batch in batches]] if case.sync else of_ranks
    return window if case.sync else [[batch] for batches in window for batch in batches]


class Run:
    """A loop, in one of the processes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        attached = case.door != "amp_backward"
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=case.micro_batches if attached else 1, mixed_precision="no"
        )
        if case.scaled:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.net, self.passes, self.bad_pass = make_net(), 0, -1
        self.optimizer: Any = AMP(self.net.parameters(), **BALL, **SGD_ARGS)
        self.module: nn.Module = LossModule(self.net, self.loss)
        if case.door == "attach before prepare()":
            attach(self.optimizer, self.module, sync_ascent=case.sync)
        loader = DataLoader(TensorDataset(*data(case)), SIZE)
        self.module, self.optimizer, self.loader = self.accelerator.prepare(self.module, self.optimizer, loader)
        if case.door == "attach after prepare()":
            attach(self.optimizer, self.module, sync_ascent=case.sync)
        self.reductions = 0
        assert isinstance(self.module, DistributedDataParallel)
        self.module.register_comm_hook(None, self.reduce)
        self.facts: dict[str, Any] = {"weights": [], "losses": [], "scales": [], "skipped": [], "reductions": []}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        self.passes += 1
        return loss * torch.inf if self.passes - 1 == self.bad_pass else loss

    def reduce(self, _, bucket):  # type: ignore[no-untyped-def] # torch refuses annotations that are strings
        self.reductions += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    def train(self) -> dict[str, Any]:
        (self.plain_loop if self.case.door.startswith("attach") else self.loop_of_windows)()
        return self.facts

    def plain_loop(self) -> None:
        for batch in self.loader:
            with self.accelerator.accumulate(self.module):
                self.begin()
                loss = self.module(*batch)["loss"]
                self.accelerator.backward(loss)
                self.update(loss)

    def loop_of_windows(self) -> None:
        micro_batches = iter(self.loader)
        while window := list(itertools.islice(micro_batches, self.case.micro_batches)):
            self.begin()
            loss = amp_backward(
                self.accelerator,
                self.module,
                self.optimizer,
                lambda batch: self.module(*batch)["loss"],
                window,
                sync_ascent=self.case.sync,
            )
            self.update(loss)

    def begin(self) -> None:
        step = len(self.facts["weights"])
        if step == OVERFLOW_AT and self.accelerator.process_index + 1 == WORLD:
            self.bad_pass = self.passes + self.case.bad_pass if self.case.bad_pass >= 0 else -1

    def update(self, loss: Tensor) -> None:
        if self.accelerator.sync_gradients and not self.case.scaled:  # accelerate does not know of this scaler
            self.accelerator.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.facts["weights"].append({name: p.detach().clone() for name, p in self.net.named_parameters()})
            self.facts["losses"].append(loss.item())
            self.facts["reductions"].append(self.reductions)
            self.facts["skipped"].append(self.optimizer.step_was_skipped)
            self.facts["scales"].append(self.accelerator.scaler.get_scale() if self.case.scaled else 0.0)
            self.reductions = 0


if __name__ == "__main__":
    facts = [Run(case).train() for case in CASES]
    torch.save(facts, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
