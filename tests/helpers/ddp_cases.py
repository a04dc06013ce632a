"""Trains a small net with `DistributedDataParallel` through every door of AMP, for test_ddp.py, as torchrun starts it.

Every process writes what it saw to `<folder>/<rank>.pt`. The data, and the groups of micro-batches that share a
perturbation, are here as well, for the reference that the weights are compared with.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from leaving import leave
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from windows import Batch, Groups

from amp_plugin import AMP, ExtraPasses, LossModule, attach
from amp_plugin.core.distributed import share_overflow

WORLD, STEPS, INNER_ITER, OVERFLOW_AT = 2, 6, 2, 3
SIZES = (6, 4)  # of the processes' micro-batches
BALL: dict[str, Any] = {"epsilon": 0.15, "inner_lr": 0.2, "inner_iter": INNER_ITER}
SGD_ARGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}

Door = Literal["closure", "ascend", "attach inside", "attach around", "attach outside"]
Branch = Literal["used", "unused", "by process", "by micro-batch"]
DOORS: tuple[Door, ...] = ("closure", "ascend", "attach inside", "attach around", "attach outside")


@dataclass(frozen=True)
class Case:
    """What a training is like.

    Attributes:
        door: attached is the module in DDP, DDP, or a module around it.
        sync: whether the ascent's gradients are averaged over the processes.
        micro_batches: of a step, in each process.
        no_sync: whether DDP averages the descent's gradients only at the last of them.
        branch: which batches use a branch of the net.
        batch_norm: none, that of each process, or one with the statistics of the batches of all.
        joined: every sample counts the same, whatever the size of its batch.
        bad_pass: which pass of a step has an infinite loss in the last process; -1 for none.
        scaled: with a gradient scaler.
        options: of DDP.
    """

    door: Door
    sync: bool = True
    micro_batches: int = 1
    no_sync: bool = True
    norm: Literal["tensor", "global"] = "tensor"
    branch: Branch = "used"
    batch_norm: Literal["none", "own", "shared"] = "none"
    joined: bool = False
    bad_pass: int = -1
    scaled: bool = False
    options: dict[str, bool] = field(default_factory=dict)


class SharedBatchNorm(nn.BatchNorm1d):
    """What SyncBatchNorm does in training, which needs a GPU: normalise by the batches of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        count = all_reduce(x.new_tensor(len(x)))
        mean = all_reduce(x.sum(0)) / count
        variance = all_reduce((x - mean).square().sum(0)) / count
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class Net(nn.Module):
    """A branch is used for a batch whose first input is positive."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.norm = norm(8)
        self.branch = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        if x[0, 0] > 0:
            h = h + torch.tanh(self.branch(h))
        out: Tensor = self.last(h)
        return out


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def batch_of(case: Case, step: int, micro_batch: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    x, y = (2 * torch.randn(SIZES[rank], n, generator=generator, dtype=torch.float64) for n in (4, 3))
    uses_branch = {
        "used": True,
        "unused": False,
        "by process": rank == 0,
        "by micro-batch": (step + micro_batch + rank) % 3 == 0,
    }
    x[0, 0] = 1.0 if uses_branch[case.branch] else -1.0
    return x, y


def groups_of(case: Case, step: int) -> Groups:
    """The micro-batches of all processes, those together that share a perturbation."""
    by_rank = [[batch_of(case, step, k, rank) for k in range(case.micro_batches)] for rank in range(WORLD)]
    together = [batch for batches in by_rank for batch in batches]
    if case.door.startswith("attach"):  # each micro-batch is perturbed for itself
        return list(zip(*by_rank, strict=True)) if case.sync else [[batch] for batch in together]
    return [together] if case.sync else by_rank


class Run:
    """A replica, its optimizer and its door."""

    def __init__(self, case: Case) -> None:
        self.case, self.rank = case, dist.get_rank()
        net = Net({"none": nn.Identity, "own": nn.BatchNorm1d, "shared": SharedBatchNorm}[case.batch_norm])
        self.net = net
        self.optimizer = AMP(net.parameters(), **BALL, **SGD_ARGS, norm=case.norm)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=case.scaled)
        self.passes_made, self.bad_pass = 0, -1
        if case.door == "attach inside":
            self.module: nn.Module = LossModule(net, self.loss)
            attach(self.optimizer, self.module, sync_ascent=case.sync)
            self.ddp = self.module = DistributedDataParallel(self.module, **case.options)
        elif case.door == "attach around":
            self.ddp = self.module = DistributedDataParallel(LossModule(net, self.loss), **case.options)
            attach(self.optimizer, self.module, sync_ascent=case.sync)
        else:
            self.ddp = DistributedDataParallel(net, **case.options)
            self.module = LossModule(self.ddp, self.loss)
        if case.door == "attach outside":
            attach(self.optimizer, self.module, sync_ascent=case.sync)
        self.passes = ExtraPasses(self.ddp)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = mean_loss(outputs, targets)
        if self.case.joined:
            loss = loss * len(outputs) / sum(SIZES) * WORLD
        self.passes_made += 1
        return loss * torch.inf if self.passes_made == self.bad_pass + 1 else loss

    def step(self, step: int) -> None:
        self.passes_made = 0
        self.bad_pass = self.case.bad_pass if step == OVERFLOW_AT and self.rank + 1 == WORLD else -1
        {"closure": self._step_of_closure, "ascend": self._step_of_ascend}.get(self.case.door, self._plain_step)(step)
        self.optimizer.zero_grad()

    def _backward(self, step: int, sync: bool = True) -> None:
        """What a loop without AMP does."""
        for k in range(self.case.micro_batches):
            last = k + 1 == self.case.micro_batches
            with nullcontext() if sync and (last or not self.case.no_sync) else self.ddp.no_sync():
                loss = self.module(*batch_of(self.case, step, k, self.rank))["loss"]
                self.scaler.scale(loss / self.case.micro_batches).backward()

    def _ascent_pass(self, step: int) -> None:
        self._backward(step, self.case.sync)
        if not self.case.sync:
            share_overflow(self.net.parameters())

    def _step_of_closure(self, step: int) -> None:
        def closure() -> None:
            self.optimizer.zero_grad()
            if self.passes_made < INNER_ITER * self.case.micro_batches:
                self._ascent_pass(step)
            else:
                self._backward(step)

        self.optimizer.step(closure, passes=self.passes)

    def _step_of_ascend(self, step: int) -> None:
        for i in range(INNER_ITER):
            with self.passes.perturbed() if i else self.passes.clean():
                self._ascent_pass(step)
            self.optimizer.ascend(grad_scale=self.scaler.get_scale())
        with self.passes.perturbed():
            self._backward(step)
        if self.case.scaled:
            self.optimizer.propagate_overflow()
        self._update()

    def _plain_step(self, step: int) -> None:
        self._backward(step)
        self._update()

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def trajectory(case: Case) -> dict[str, Any]:
    """What this process has after each step; or the error that training ends with."""
    run = Run(case)
    facts: dict[str, Any] = {"weights": [], "buffers": [], "scales": []}
    try:
        for step in range(STEPS):
            run.step(step)
            facts["weights"].append({name: p.detach().clone() for name, p in run.net.named_parameters()})
            facts["buffers"].append({name: b.clone() for name, b in run.net.named_buffers()})
            facts["scales"].append(run.scaler.get_scale())
    except RuntimeError as error:
        facts["error"] = str(error)
    return facts


def share(bad_rank: int) -> list[Tensor]:
    """Gradients after `share_overflow`: one of numbers whose norm would overflow, one of none, and one missing."""
    params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n, dtype in ((9, torch.half), (0, torch.float), (2, None))]
    params[0].grad, params[1].grad = torch.full((9,), 6e4).half(), torch.zeros(0)
    if dist.get_rank() == bad_rank:
        params[0].grad[4] = torch.nan
    share_overflow(params)
    return [p.grad for p in params if p.grad is not None]


CASES = {
    "plain": [Case(d, s, norm=n) for d in DOORS for s in (True, False) for n in ("tensor", "global")],
    "accumulation": [Case(d, s, 3, no_sync) for d in DOORS for s in (True, False) for no_sync in (True, False)],
    "gradients in buckets": [
        Case(d, s, 3, options={"gradient_as_bucket_view": True}) for d in DOORS for s in (True, False)
    ],
    "unused": [
        Case(d, s, k, branch=branch, options={"find_unused_parameters": True, "gradient_as_bucket_view": k == 3})
        for d in DOORS
        for s in (True, False)
        for k, branch in ((1, "unused"), (1, "by process"), (3, "by micro-batch"))
    ],
    "batch norm": [
        Case(d, s, batch_norm="own", options={"broadcast_buffers": broadcast})
        for d in DOORS
        for s in (True, False)
        for broadcast in (True, False)
    ],
    "joined": [Case(d, batch_norm=bn, joined=True) for d in DOORS for bn in ("none", "shared")],
    "overflow": [Case(d, s, bad_pass=i) for d in DOORS for s in (True, False) for i in range(INNER_ITER)],
    "scaled overflow": [
        Case(d, s, bad_pass=i, scaled=True) for d in DOORS[1:] for s in (True, False) for i in range(INNER_ITER + 1)
    ],
    "static graph": [Case(d, options={"static_graph": True}) for d in DOORS],
}

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    facts: dict[str, Any] = {name: [trajectory(case) for case in cases] for name, cases in CASES.items()}
    facts["shared"] = {bad_rank: share(bad_rank) for bad_rank in (-1, 0, 1)}
    torch.save(facts, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
