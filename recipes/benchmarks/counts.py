"""Operators, host synchronisations and bytes communicated of a step, and the optimizer's own work against a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from amp_plugin import AMP
from benchmarks.counting import CountCalls
from benchmarks.rows import Row, counted, timed
from benchmarks.step import LADDER, SGD_ARGS, Batch, Step, architecture, closure, plain, problem
from benchmarks.turns import repeat, take_turns

_SAM = "SAM of pytorch_optimizer"
_WAYS: dict[str, Callable[..., Step]] = {
    "SGD": partial(plain, foreach=True),
    "AMP, attach": partial(plain, amp=True, foreach=True),
    "AMP, attach, sync_ascent=False": partial(plain, amp=True, sync_ascent=False, foreach=True),
    "AMP, closure": partial(closure, foreach=True),
    _SAM: partial(closure, sam=True, foreach=True),
}
# `ascend` and `restore` pass over the weights for the backup, the norms, clearing what is not finite, scaling, the
# addition, and restoring.
WEIGHT_SIZED_PASSES = 6


def measure() -> Iterator[list[Row]]:
    """Count a step of a narrow PreActResNet18, which holds for any width; time the own work at each size."""
    yield calls()
    yield communication()
    for size, model_args in LADDER.items():
        yield own_work(size, model_args)


def calls() -> list[Row]:
    """Count what is dispatched in one step beyond its forward and backward passes."""
    model, (images, labels) = _narrow()
    one_pass = _count(lambda: F.cross_entropy(model(images), labels).backward()).kernels
    counts = {}
    for name in ("SGD", "AMP, closure", "AMP, attach", _SAM):
        step = _WAYS[name](*_narrow())
        step()  # makes the buffers
        counts[name] = _count(step)
    base, rows = counts.pop("SGD"), []
    for name, count in counts.items():
        kernels = count.kernels - 2 * one_pass, base.kernels - one_pass
        rows.append(counted("Operators", "PreActResNet18, beyond the passes", name, "SGD", *kernels, "calls"))
        syncs = sum(count.syncs.values()), sum(base.syncs.values())
        rows.append(counted("Host synchronisations", "PreActResNet18, in one step", name, "SGD", *syncs, "calls"))
    return rows


def communication() -> list[Row]:
    """Count the bytes that a process hands to collective operations in one step under DDP.

    The figure does not depend on the number of processes.
    """
    sent = {}
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for name, way in _WAYS.items():
            model, batch = _narrow()
            step = way(DistributedDataParallel(model), batch)
            for _ in range(2):  # the buffers; DDP arranges its buckets anew after its first backward pass
                step()
            sent[name] = _count(step).communicated / 2**20
            del step
    finally:
        distributed.destroy_process_group()
    weights = sum(p.numel() * p.element_size() for p in _narrow()[0].parameters()) / 2**20
    return [
        counted("Communication", "DDP, one step", name, "the weights", some, weights, "MiB")
        for name, some in sent.items()
    ]


def own_work(size: str, model_args: dict[str, Any], rounds: int = 15) -> list[Row]:
    """Time `ascend` and `restore`, with the gradients given, against a copy of the weights for each pass they make."""
    model, _ = problem(model_args, 1)
    params: list[Tensor] = list(model.parameters())
    optimizer = AMP(params, **SGD_ARGS)
    copies = [torch.empty_like(p) for p in params]

    def make_gradients() -> None:
        for p in params:
            p.grad = torch.full_like(p, 1e-3)

    def displace() -> None:
        optimizer.ascend()
        optimizer.restore()

    @torch.no_grad()
    def copy() -> None:
        torch._foreach_copy_(copies, params)

    case = f"{size} parameters ({sum(p.numel() for p in params):,})"
    name = f"ascend and restore, each of their {WEIGHT_SIZED_PASSES} passes over the weights"
    loops = {"ours": repeat(displace), "copy": repeat(copy)}
    times = take_turns(loops, (rounds, rounds), warm_up=2, prepare=make_gradients)
    ours, theirs = [1e3 * t / WEIGHT_SIZED_PASSES for t in times["ours"]], [1e3 * t for t in times["copy"]]
    return [timed("Own work", case, name, "copy of the weights", ours, theirs, "ms")]


def _count(action: Step) -> CountCalls:
    with CountCalls() as count:
        action()
    return count


def _narrow() -> tuple[nn.Module, Batch]:
    model, batch = problem({"width": 8}, 2)
    return architecture(model), batch
