"""Operators, host synchronisations and bytes communicated of a step, and the optimizer's own work against a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from amp_plugin import AMP, LossModule, attach
from benchmarks.counting import CountCalls
from benchmarks.rows import Row, counted, timed
from benchmarks.step import LADDER, SGD_ARGS, Batch, architecture, closure_of, problem

Step = Callable[[], Any]


def measure() -> Iterator[list[Row]]:
    """Counts of a narrow PreActResNet18, which hold for any width; own work at each size."""
    yield calls()
    yield communication()
    for size, model_args in LADDER.items():
        yield own_work(size, model_args)


def calls() -> list[Row]:
    """What is dispatched in one step beyond its forward and backward passes."""
    steps = {"SGD": _sgd, "AMP, closure": _closure, "AMP, attach": _attached, "SAM of pytorch_optimizer": _sam}
    passes = {name: 1 if name == "SGD" else 2 for name in steps}
    model, (images, labels) = _narrow()
    one_pass = _count(lambda: F.cross_entropy(model(images), labels).backward()).kernels
    model.zero_grad()
    counts = {}
    for name, make in steps.items():
        step = make(*_narrow())
        step()  # makes the buffers
        counts[name] = _count(step)
    rows, base = [], counts.pop("SGD")
    for name, count in counts.items():
        beyond = count.kernels - passes[name] * one_pass
        rows.append(
            counted(
                "Operators", "PreActResNet18, beyond the passes", name, "SGD", beyond, base.kernels - one_pass, "calls"
            )
        )
    for name, count in counts.items():
        syncs, base_syncs = (sum(c.syncs.values()) for c in (count, base))
        rows.append(
            counted("Host synchronisations", "PreActResNet18, in one step", name, "SGD", syncs, base_syncs, "calls")
        )
    return rows


def communication() -> list[Row]:
    """Bytes that one process hands to collective operations in one step under DDP, whatever the number of processes."""
    steps: dict[str, Callable[..., Step]] = {
        "SGD": _sgd,
        "AMP, attach": _attached,
        "AMP, attach, sync_ascent=False": partial(_attached, sync_ascent=False),
        "AMP, closure": _closure,
        "SAM of pytorch_optimizer": _sam,
    }
    sent = {}
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for name, make in steps.items():
            model, batch = _narrow()
            step = make(DistributedDataParallel(model), batch)
            for _ in range(2):  # the buffers; DDP arranges its buckets anew after its first backward pass
                step()
            sent[name] = _count(step).communicated
            del step
    finally:
        distributed.destroy_process_group()
    weights = sum(p.numel() * p.element_size() for p in _narrow()[0].parameters())
    return [
        counted("Communication", "DDP, one step", name, "the weights", some / 2**20, weights / 2**20, "MiB")
        for name, some in sent.items()
    ]


def own_work(size: str, model_args: dict[str, Any], rounds: int = 15) -> list[Row]:
    """`ascend` and `restore`, with the gradients given, against a copy of the weights for each pass they make."""
    model, _ = problem(model_args, 1)
    params: list[Tensor] = list(model.parameters())
    optimizer = AMP(params, **SGD_ARGS)
    copies = [torch.empty_like(p) for p in params]
    weights = sum(p.numel() for p in params)

    def displace() -> None:
        optimizer.ascend()
        optimizer.restore()

    def copy() -> None:
        with torch.no_grad():
            torch._foreach_copy_(copies, params)

    times: list[float] = []
    base: list[float] = []
    for i in range(rounds + 2):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        pair = _seconds(displace), _seconds(copy)
        if i >= 2:
            times.append(1e3 * pair[0] / WEIGHT_SIZED_PASSES)
            base.append(1e3 * pair[1])
    case = f"{size} parameters ({weights:,})"
    name = f"ascend and restore, each of their {WEIGHT_SIZED_PASSES} passes over the weights"
    return [timed("Own work", case, name, "copy of the weights", times, base, "ms")]


# Backup, norms, clearing what is not finite, scaling, addition; restoring.
WEIGHT_SIZED_PASSES = 6


def _seconds(action: Step) -> float:
    start = time.perf_counter()
    action()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _count(action: Step) -> CountCalls:
    count = CountCalls()
    with count:
        action()
    return count


def _narrow() -> tuple[nn.Module, Batch]:
    model, batch = problem({"width": 8}, 2)
    return architecture(model), batch


def _sgd(model: nn.Module, batch: Batch) -> Step:
    return _plain(LossModule(model, F.cross_entropy), batch, SGD(model.parameters(), foreach=True, **SGD_ARGS))


def _attached(model: nn.Module, batch: Batch, *, sync_ascent: bool = True) -> Step:
    module = LossModule(model, F.cross_entropy)
    optimizer = AMP(model.parameters(), foreach=True, **SGD_ARGS)
    attach(optimizer, module, sync_ascent=sync_ascent)
    return _plain(module, batch, optimizer)


def _plain(module: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        module(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _closure(model: nn.Module, batch: Batch) -> Step:
    optimizer = AMP(model.parameters(), foreach=True, **SGD_ARGS)
    closure = closure_of(model, batch, optimizer)
    return lambda: optimizer.step(closure)


def _sam(model: nn.Module, batch: Batch) -> Step:
    optimizer = SAM(model.parameters(), SGD, foreach=True, **SGD_ARGS)
    closure = closure_of(model, batch, optimizer)

    def step() -> None:
        closure()
        optimizer.step(closure)

    return step
