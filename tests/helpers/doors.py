"""The doors of AMP as training steps on a module that returns its loss, for tests that compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from amp_plugin import AMP, ExtraPasses, attach

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], object]
Door = Callable[[nn.Module, AMP], Step]


def by_closure(module: nn.Module, optimizer: AMP) -> Step:
    passes = ExtraPasses(module)

    def step(batch: Batch) -> None:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = module(*batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(evaluate, passes=passes)

    return step


def by_ascend(module: nn.Module, optimizer: AMP) -> Step:
    passes = ExtraPasses(module)

    def step(batch: Batch) -> None:
        for i in range(optimizer.inner_iter + 1):
            with passes.perturbed() if i else passes.clean():
                module(*batch)["loss"].backward()
            if i < optimizer.inner_iter:
                optimizer.ascend()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_attach(module: nn.Module, optimizer: AMP) -> Step:
    attach(optimizer, module)
    return plain_loop(module, optimizer)


def plain_loop(module: Callable[..., Any], optimizer: AMP) -> Step:
    def step(batch: Batch) -> None:
        module(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


DOORS: list[Door] = [by_closure, by_ascend, by_attach]
