"""AMP with an ascent policy, slowly and plainly, in float64: what the package's policies are compared with.

The ball and SGD are those of `reference.py`. A policy is a rule of a few lines: what to ascend along in a step, if at
all. It shares no code with the package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from reference import Tensors, l2, project, sgd
from torch import Tensor, nn
from torch.func import functional_call

Batch = tuple[Tensor, Tensor]


@dataclass
class Moment:
    """What a rule can see before a step."""

    step: int
    window: Sequence[Batch]  # the micro-batches of the step
    theta: Tensors
    velocity: Tensors  # of SGD: empty before the first step
    descents: list[Tensors]  # the gradients that the steps before have descended along
    gradient: Callable[[Sequence[Batch]], Tensors]  # at theta, the mean over micro-batches


Rule = Callable[[Moment], Tensors | None]


def full(m: Moment) -> Tensors:
    return m.gradient(m.window)


def half(m: Moment) -> Tensors:
    """The first half of the samples; of several micro-batches the first half of them."""
    k = len(m.window)
    return m.gradient(half_of_each(m) if k == 1 else m.window[: k // 2])


def half_of_each(m: Moment) -> list[Batch]:
    return [(x[: len(x) // 2], y[: len(y) // 2]) for x, y in m.window]


def quarter(m: Moment) -> Tensors:
    """The first quarter of the samples; of two micro-batches the first."""
    return quarter_of_each(m) if len(m.window) == 1 else m.gradient(m.window[:1])


def quarter_of_each(m: Moment) -> Tensors:
    return m.gradient([(x[:2], y[:2]) for x, y in m.window])


def three_quarters(window: Sequence[Batch]) -> Sequence[Batch]:
    """What `quarter` leaves, for the descent."""
    return three_quarters_of_each(window) if len(window) == 1 else window[1:]


def three_quarters_of_each(window: Sequence[Batch]) -> Sequence[Batch]:
    return [(x[2:], y[2:]) for x, y in window]


def stale(m: Moment) -> Tensors | None:
    return m.descents[-1] if m.descents else None


def momentum(m: Moment) -> Tensors | None:
    """SGD's velocity is a sum that forgets a tenth in each step."""
    return {name: 0.1 * v for name, v in m.velocity.items()} if m.velocity else None


def adaptive(m: Moment, threshold: float = -1.4) -> Tensors | None:
    """If the gradient before the last was larger than those before it usually were."""
    norms = [sum(g.square().sum().item() for g in descent.values()) for descent in m.descents[:-1]]
    mean, variance = (norms or [0.0])[0], 0.0
    for i, n in enumerate(norms):
        mean = n if i == 0 else 0.9 * mean + 0.1 * n
        variance = 0.9 * variance + 0.1 * (n - mean) ** 2
    return full(m) if not norms or norms[-1] >= mean + threshold * math.sqrt(variance) else None


def of_batch_norm(m: Moment) -> Tensors:
    return {name: g for name, g in full(m).items() if name.startswith("body.1.")}


def when(condition: Callable[[int], bool], rule: Rule) -> Rule:
    return lambda m: rule(m) if condition(m.step) else None


# By the arguments of AMP, the rule and the forward and backward passes over the batch of each step.
STEPS = 20
RULES: dict[tuple[str, str | None], tuple[Rule, Callable[[int], float] | None]] = {
    ("full", None): (full, lambda t: 2.0),
    ("subset(0.5)", None): (half, lambda t: 1.5),
    ("split(0.25)", None): (quarter, lambda t: 1.0),
    ("every(3)", None): (when(lambda t: t % 3 == 0, full), lambda t: 2.0 if t % 3 == 0 else 1.0),
    ("window(5, 12)", None): (when(lambda t: 5 <= t < 12, full), lambda t: 2.0 if 5 <= t < 12 else 1.0),
    ("stale", None): (stale, lambda t: 1.0),
    ("momentum", None): (momentum, lambda t: 1.0),
    ("adaptive(-1.4)", None): (adaptive, None),
    ("every(2), subset(0.5)", None): (when(lambda t: t % 2 == 0, half), lambda t: 1.5 if t % 2 == 0 else 1.0),
    ("split(0.25), every(2)", None): (when(lambda t: t % 2 == 0, quarter), lambda t: 1.0),
    ("stale, every(2)", None): (when(lambda t: t % 2 == 0, stale), lambda t: 1.0),
    ("full", "norm"): (of_batch_norm, lambda t: 2.0),
}


def descent_of(ascent: str) -> Callable[[Sequence[Batch]], Sequence[Batch]]:
    """What the descent of a step that ascends is on."""
    return three_quarters if "split" in ascent else lambda window: window


def policy_trajectory(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    windows: Sequence[Sequence[Batch]],
    rule: Rule,
    *,
    lr: float,
    epsilon: float,
    inner_lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    each: int = 0,
    descent_on: Callable[[Sequence[Batch]], Sequence[Batch]] = lambda window: window,
    clip: float = 0.0,
) -> list[tuple[Tensors, bool]]:
    """Train a float64 copy of `model`.

    Args:
        model: called as `model(inputs)`; its running statistics do not matter.
        loss_fn: the mean loss of a micro-batch.
        windows: the micro-batches of each step.
        rule: what to ascend along.
        lr, epsilon, inner_lr, momentum, nesterov, weight_decay: of AMP around SGD.
        each: how many micro-batches are perturbed together; 0 for all of a step.
        descent_on: micro-batches for the descent of a step that ascends.
        clip: largest global norm of the descent gradient, as `torch.nn.utils.clip_grad_norm_` clips; 0 for no limit.

    Returns:
        For each step the parameters after it, and whether it ascended.
    """
    model = copy.deepcopy(model).double()
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity: Tensors = {}
    descents: list[Tensors] = []
    trajectory = []

    def gradient(point: Tensors, window: Sequence[Batch]) -> Tensors:
        leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        losses = [loss_fn(functional_call(model, {**leaves, **buffers}, (x.double(),)), y) for x, y in window]
        return dict(zip(leaves, torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values())), strict=True))

    for step, window in enumerate(windows):
        descent = {name: torch.zeros_like(p) for name, p in theta.items()}
        groups = [window[i : i + each] for i in range(0, len(window), each)] if each else [window]
        for group in groups:
            at_theta = lambda part: gradient(theta, part)  # noqa: B023, E731
            along = rule(Moment(step, group, theta, dict(velocity), descents, at_theta))
            delta = project({name: inner_lr * g for name, g in (along or {}).items()}, epsilon, "tensor")
            moved = {name: p + delta[name] if name in delta else p for name, p in theta.items()}
            for name, g in gradient(moved, group if along is None else descent_on(group)).items():
                descent[name] += g / len(groups)
        if clip:
            factor = min(1.0, clip / (l2(descent.values()) + 1e-6))  # the 1e-6 is clip_grad_norm_'s
            descent = {name: factor * g for name, g in descent.items()}
        theta = sgd(theta, descent, velocity, lr, momentum, nesterov, weight_decay)
        descents.append(descent)
        trajectory.append((theta, along is not None))
    return trajectory
