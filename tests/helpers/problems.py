"""Small training problems that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def small_net(
    dtype: torch.dtype = torch.float32,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """3x8x8 images to 4 classes, with BatchNorm and optionally dropout."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        activation(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(216, 4),
    ]
    return nn.Sequential(*layers).to(dtype)


def small_batches(count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Batches of random images and labels."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def closure_for(
    optimizer: torch.optim.Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The closure of the released scripts: clear, forward, backward; returns outputs and loss."""

    def closure() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        outputs = model(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        loss.backward()
        return outputs, loss

    return closure


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def max_relative_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest over the tensors of ||a - b|| / ||b||."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp(min=1e-30)) for k in a)


SGD_ARGS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}


def train(optimizer: torch.optim.Optimizer, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:
        optimizer.step(closure_for(optimizer, model, batch))


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


class InOneSlot(torch.autograd.Function):
    """Returns a value in memory that the next call overwrites, as a CUDA graph of a compiled module does."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slot: Tensor) -> Tensor:
        return slot.copy_(value).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None
