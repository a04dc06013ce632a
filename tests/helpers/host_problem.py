"""One small training for all hosts: a network and its batches, and the weights where AMP has to arrive.

The weights come from the float64 reference; those of 16-bit arithmetic, which the reference has not, from a loop that
is written out here with nothing of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ascent_reference import Batch, full, policy_trajectory
from problems import max_relative_difference, parameters_of, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from amp_plugin import AMP, Perturbation

SGD_ARGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
BALL: dict[str, Any] = {"epsilon": 0.3, "inner_lr": 0.5}
STEPS = 6


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The same weights at each call; a smooth activation, so that rounding stays small."""
    return small_net(dtype, activation=nn.Tanh)


NAMES = [name for name, _ in net().named_parameters()]


def batches(dtype: torch.dtype = torch.float64, count: int = STEPS) -> list[Batch]:
    return small_batches(count, dtype=dtype)


def amp(params: Any, **changes: Any) -> AMP:
    return AMP(params, **{**SGD_ARGS, **BALL, **changes})


def reference(
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    each: bool = True,
    windows: Sequence[Sequence[Batch]] | None = None,
) -> list[dict[str, Tensor]]:
    """Weights after each step; with `each` every micro-batch is perturbed for itself, as attached modules do it."""
    data = batches()
    trajectory = policy_trajectory(
        net(),
        F.cross_entropy,
        windows or [data[i : i + accumulate] for i in range(0, len(data), accumulate)],
        full,
        **SGD_ARGS,
        **BALL,
        each=int(each),
        clip=clip_norm or 0.0,
    )
    return [theta for theta, _ in trajectory]


def plainly(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights that SGD alone arrives at."""
    model = net(dtype)
    optimizer = SGD(model.parameters(), **SGD_ARGS)
    for x, y in batches(dtype)[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return parameters_of(model)


def set_gradients_of_amp(
    model: nn.Module, loss_at: Callable[[nn.Module], Tensor], share: float = 1.0, ball: Mapping[str, float] = BALL
) -> None:
    """Add to the gradients a share of that of the loss at theta + delta, written out; statistics stay as they are."""

    def trained(point: nn.Module) -> list[nn.Parameter]:
        return [p for p in point.parameters() if p.requires_grad]

    def gradients(point: nn.Module) -> Sequence[Tensor | None]:
        return torch.autograd.grad(loss_at(point), trained(point), allow_unused=True)

    worst = copy.deepcopy(model)
    for p, g in zip(trained(worst), gradients(copy.deepcopy(model)), strict=True):
        if g is not None:
            delta = ball["inner_lr"] * g
            p.data += delta * (ball["epsilon"] / delta.norm()).clamp(max=1.0)
    for p, g in zip(trained(model), gradients(worst), strict=True):
        p.grad = None if g is None else share * g + (0.0 if p.grad is None else p.grad)


def in_bf16() -> dict[str, Tensor]:
    """Weights of AMP written out, with autocast around model and loss."""
    model = net(torch.float32)
    optimizer = SGD(model.parameters(), **SGD_ARGS)

    def loss_at(point: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(point(x), y)

    for x, y in batches(torch.float32):
        optimizer.zero_grad()
        set_gradients_of_amp(model, lambda point, x=x, y=y: loss_at(point, x, y))
        optimizer.step()
    return parameters_of(model)


def weights(module: nn.Module, part: str = "") -> dict[str, Tensor]:
    """A copy of the parameters by their names in `net()`, wherever the host has put the network."""
    found = {name: p.detach().clone() for name, p in module.named_parameters() if part in name}
    return {name: next(p for full_name, p in found.items() if full_name.endswith(name)) for name in NAMES}


def assert_arrived(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, within: float = 1e-9) -> None:
    """Both trainings arrived at the same weights, which are far from those of the base optimizer."""
    assert max_relative_difference(dict(found), dict(expected)) < within


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@contextmanager
def ascents_counted() -> Iterator[Callable[[], int]]:
    """Count the ascents of all optimizers."""
    number, ascend = 0, Perturbation.ascend

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal number
        number += 1
        ascend(*args, **kwargs)

    Perturbation.ascend = counted  # type: ignore[method-assign]
    try:
        yield lambda: number
    finally:
        Perturbation.ascend = ascend  # type: ignore[method-assign]


def moving_average(points: Sequence[Mapping[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The exponential moving average of weights, which starts with the first."""
    mean = {name: p.clone() for name, p in points[0].items()}
    for point in points[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * p for name, p in point.items()}
    return mean
