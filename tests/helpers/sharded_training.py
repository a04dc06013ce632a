"""Trains a small net whose parameters are spread over processes, for test_fsdp.py; started as torchrun does.

Every process writes what it saw to `<folder>/<rank>.pt`. How many processes there are decides which cases run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from leaving import leave
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from amp_plugin import AMP, LossModule, Perturbation, attach
from amp_plugin.core.bucket import Ascent

PATIENCE = timedelta(minutes=2)  # with a process that does not come to a collective
STEPS = 10
BALL = {"epsilon": 0.15, "inner_lr": 0.2}
SGD_ARGS = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}

Kind = Literal["plain", "fsdp", "mixed", "hsdp", "tensor parallel", "fsdp of tensor parallel", "pending sums"]


@dataclass(frozen=True)
class Case:
    norm: Literal["tensor", "global"]
    inner_iter: int = 1
    kind: Kind = "fsdp"
    reshard_after_forward: bool | None = None
    dtype: torch.dtype = torch.float64
    door: Literal["closure", "ascend()", "attach"] = "closure"
    groups: bool = False
    micro_batches: int = 1
    base: str = "SGD"

    def __str__(self) -> str:
        reshard = {None: "", True: ", reshard", False: ", no reshard"}[self.reshard_after_forward]
        extra = (", float32" if self.dtype == torch.float32 else "") + (", two groups" if self.groups else "")
        extra += f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{self.kind}, {self.norm}, {self.inner_iter}, {self.door}{reshard}{extra}"


NORMS: tuple[Literal["tensor", "global"], ...] = ("tensor", "global")
CASES = {
    2: [
        *(Case(n, i, reshard_after_forward=r) for n in NORMS for i in (1, 2) for r in (True, False)),
        *(Case(n, 2, door="ascend()", micro_batches=k) for n in NORMS for k in (1, 2)),
        *(Case(n, 2, door="attach", reshard_after_forward=r) for n in NORMS for r in (True, False)),
        *(Case(n, 1, dtype=torch.float32) for n in NORMS),
        *(Case(n, 2, "mixed") for n in NORMS),
        *(Case(n, 2, groups=True) for n in NORMS),
        *(Case(n, 2, "tensor parallel") for n in NORMS),
        *(Case(n, 2, "pending sums") for n in NORMS),
    ],
    3: [*(Case(n, i) for n in NORMS for i in (1, 2)), Case("global", 2, "mixed")],
    4: [Case(n, 2, kind) for n in NORMS for kind in ("fsdp", "hsdp", "fsdp of tensor parallel")],
}


class Scale(nn.Module):
    """One number: with several processes all but one hold an empty part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Net(nn.Sequential):
    """8, 5, 3 and 1 rows, which two, three or four processes cannot share evenly."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), Scale(), nn.Linear(5, 3)]
        super().__init__(*(layer.to(dtype) for layer in layers))


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def batches(dtype: torch.dtype = torch.float64, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(2 * torch.randn(12, width, generator=generator, dtype=torch.float64).to(dtype) for width in (4, 3))
        for _ in range(steps)
    ]  # type: ignore[misc]


class Run:
    """A net spread over processes as a case asks, its optimizer, and the part of a batch that this process sees."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if case.kind != "plain" else (1, 0)
        self.net: nn.Module = Net(case.dtype)
        if case.kind != "plain":
            getattr(self, "_" + case.kind.replace(" ", "_"))()
        params = list(self.net.parameters())
        assert any(isinstance(p, DTensor) for p in params) == (case.kind != "plain")
        groups: Any = params
        if case.groups:
            groups = [{"params": params[:2], "epsilon": 0.3}, {"params": params[2:], "weight_decay": 0.0}]
        descent: Any = SGD_ARGS if case.base == "SGD" else {"lr": 0.01, "base_optimizer": case.base}
        self.optimizer = AMP(groups, **BALL, **descent, norm=case.norm, inner_iter=case.inner_iter)
        if case.door == "attach":
            self.loss = LossModule(self.net, mean_loss)
            attach(self.optimizer, self.loss)

    def _fsdp(self, mesh: DeviceMesh | None = None) -> None:
        mesh = mesh or init_device_mesh("cpu", (self.world,))
        for module in (self.net[0], self.net[2], self.net):  # type: ignore[index]
            fully_shard(module, mesh=mesh, reshard_after_forward=self.case.reshard_after_forward)

    def _mixed(self) -> None:
        for module in (self.net[0], self.net[2]):  # type: ignore[index]
            fully_shard(module, mesh=init_device_mesh("cpu", (self.world,)))
        assert not all(isinstance(p, DTensor) for p in self.net.parameters())

    def _hsdp(self) -> None:
        self._fsdp(init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("replicas", "shards")))

    def _tensor_parallel(self, mesh: DeviceMesh | None = None) -> None:
        mesh = mesh or init_device_mesh("cpu", (self.world,))
        parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        self.world, self.rank = 1, 0  # every process sees the whole batch

    def _fsdp_of_tensor_parallel(self) -> None:
        mesh = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("data", "tensor"))
        self._tensor_parallel(mesh["tensor"])
        self._fsdp(mesh["data"])
        self.world, self.rank = 2, mesh["data"].get_local_rank()

    def _pending_sums(self) -> None:
        """Parameters are replicated DTensors, and their gradients are left as sums over the processes."""
        self.mesh = init_device_mesh("cpu", (self.world,))
        distribute_module(self.net, self.mesh)

    def part(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.case.kind == "pending sums":
            return tuple(distribute_tensor(t, self.mesh, [Shard(0)]) for t in batch)
        return tuple(t.tensor_split(self.world)[self.rank] for t in batch)

    def backward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        micro_batches = [self.part(batch)]
        if self.case.micro_batches > 1:
            micro_batches = list(zip(*(t.chunk(self.case.micro_batches) for t in micro_batches[0]), strict=True))
        for k, (inputs, targets) in enumerate(micro_batches, start=1):
            if len(micro_batches) > 1:
                self.net.set_requires_gradient_sync(k == len(micro_batches))
            loss = mean_loss(self.net(inputs), targets) / len(micro_batches)
            loss.backward()
        for p in self.net.parameters():
            assert p.grad is not None
            if self.case.kind == "mixed" and not isinstance(p, DTensor):  # FSDP does not look after these
                dist.all_reduce(p.grad)
                p.grad /= self.world
            if self.case.kind == "pending sums":
                assert p.grad.placements[0].is_partial()
        return loss

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            return self.backward(batch)

        if self.case.door == "closure":
            self.optimizer.step(closure)
            return
        if self.case.door == "attach":
            self.optimizer.zero_grad()
            self.loss(*self.part(batch))["loss"].backward()
            self.optimizer.step()
            return
        for _ in range(self.case.inner_iter):
            self.backward(batch)
            self.optimizer.ascend()
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Of the whole net; all processes have to call this."""
        params = self.net.named_parameters()
        return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in params}

    def parts(self) -> list[Tensor]:
        """What this process holds of the optimizer's parameters (a module may show gathered copies for a while)."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def trajectory(case: Case) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Weights and the ascent's statistics after each step."""
    run, steps = Run(case), []
    for batch in batches(case.dtype):
        run.step(batch)
        steps.append((run.weights(), {name: value.item() for name, value in run.optimizer.statistics().items()}))
    return steps


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_bad_entry(case: Case, bad_ascent: int) -> dict[str, Any]:
    """The last process's part of one gradient has a NaN in one of the ascents."""
    run, (first, second, third) = Run(case), batches(steps=3)
    run.step(first)
    before, moved = run.parts(), []
    for i in range(case.inner_iter):
        run.backward(second)
        grad = run.net[0].weight.grad.to_local()  # type: ignore[index, union-attr]
        if i == bad_ascent and run.rank == run.world - 1:
            grad[0, 0] = torch.nan
        run.optimizer.ascend()
        moved.append(not same_bits(run.parts(), before))
    run.backward(second)
    run.optimizer.step()
    run.optimizer.zero_grad()
    for batch in (None, third):
        if batch:
            run.step(batch)
        moved.append(not same_bits(run.parts(), before))
    return {"moved": moved, "skipped": run.optimizer.skipped_steps}


def step_that_fails(run: Run, batch: tuple[Tensor, Tensor], failing_call: int, backward_first: bool) -> None:
    """Raises ValueError in one pass, before or after its backward."""
    calls = []

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        calls.append(run.optimizer.perturbed)
        if len(calls) == failing_call + 1:
            if backward_first:
                run.backward(batch)
            else:
                run.net(run.part(batch)[0])
            raise ValueError
        return run.backward(batch)

    run.optimizer.step(closure)


def failing_closure(case: Case) -> dict[str, Any]:
    """Every pass fails once or twice; then training goes on."""
    run, steps, clean = Run(case), batches(), []
    run.step(steps[0])
    for failing_call in range(case.inner_iter + 1):
        for backward_first in (False, True):
            before = run.parts()
            try:
                step_that_fails(run, steps[1], failing_call, backward_first)
            except ValueError:
                clean.append(same_bits(run.parts(), before) and not run.optimizer.perturbed)
            for module in run.net.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # a forward pass without a backward pass has left gathered weights there
    for batch in steps[1:]:
        run.step(batch)
    return {"clean": clean, "weights": run.weights()}


def no_sync(case: Case) -> dict[str, Any]:
    """An ascent pass with FSDP's gradient synchronisation switched off."""
    run, (batch,) = Run(case), batches(steps=1)
    before, messages = run.parts(), []
    run.net.set_requires_gradient_sync(False)

    def closure() -> Tensor:
        inputs, targets = run.part(batch)
        loss = mean_loss(run.net(inputs), targets)
        loss.backward()
        return loss

    for door in (lambda: run.optimizer.step(closure), lambda: (closure(), run.optimizer.ascend())):
        try:
            door()
        except RuntimeError as error:
            messages.append(str(error))
    return {"messages": messages, "unchanged": same_bits(run.parts(), before)}


def attached_root(case: Case) -> dict[str, Any]:
    """The attached module is itself the root that FSDP hooks; and passes whose backward never comes."""
    run = Run(case)
    loss, steps = LossModule(run.net, mean_loss), batches()
    fully_shard(loss, reshard_after_forward=False)
    attach(run.optimizer, loss)
    same = []
    for batch in steps:
        part = run.part(batch)
        with torch.no_grad():
            clean = loss(*part)["loss"]
        before = run.parts()
        loss(*part)  # only looked at
        with torch.no_grad():
            same.append(torch.equal(loss(*part)["loss"], clean) and same_bits(run.parts(), before))
        run.optimizer.zero_grad()
        loss(*part)["loss"].backward()
        run.optimizer.step()
    return {"same": same, "weights": run.weights()}


def attached_too_early(case: Case) -> str:
    """FSDP's hooks would come before those of attach()."""
    net = Net()
    loss = LossModule(net, mean_loss)
    optimizer = AMP(loss.parameters(), **BALL, lr=0.1)
    attach(optimizer, loss)
    fully_shard(loss)
    try:
        loss(*batches(steps=1)[0])
    except RuntimeError as error:
        return str(error)
    return ""


def entry_of_one_process(entry: float) -> dict[str, Any]:
    """One process's part of a float32 gradient holds a number that is not finite, or whose square is not."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight, grad = torch.zeros(4, 3), torch.ones(4, 3)
    grad[0, 0] = entry
    param, part = (distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, grad))
    ball = Perturbation()
    ball.ascend([Ascent(param, part, 1.0, 0.5)])
    return {"length": param.full_tensor().norm().item(), "finite": ball.was_finite()}


def collectives(case: Case) -> dict[str, int]:
    """How many times one ascent communicates."""
    run, (batch,) = Run(case), batches(steps=1)
    run.backward(batch)
    with CommDebugMode() as counter:
        run.optimizer.ascend()
    return {str(name): n for name, n in counter.get_comm_counts().items()}


def all_facts(world: int) -> dict[str, Any]:
    facts: dict[str, Any] = {str(case): trajectory(case) for case in CASES[world]}
    if world == 2:
        checks: dict[str, Callable[[Case], Any]] = {"collectives": collectives}
        checks |= {f"NaN in ascent {i}": lambda case, i=i: one_bad_entry(case, i) for i in (0, 1)}
        for name, check in checks.items():
            facts |= {f"{name}, {norm}": check(Case(norm, 2, door="ascend()")) for norm in NORMS}
        for reshard in (True, False):
            facts[f"failing closure, {reshard}"] = failing_closure(Case("tensor", 2, reshard_after_forward=reshard))
        facts |= {f"entry {entry}": entry_of_one_process(entry) for entry in (1.0, 1e20, torch.nan)}
        facts["no sync"] = no_sync(Case("tensor"))
        facts["attached root"] = attached_root(Case("tensor", 2, reshard_after_forward=False))
        facts["attached too early"] = attached_too_early(Case("tensor"))
    return facts


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=PATIENCE)
    torch.save(all_facts(dist.get_world_size()), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
