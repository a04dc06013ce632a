"""AMP over several micro-batches and processes, slowly and plainly, in float64: what loops are compared with.

The ball and SGD are those of `reference.py`. A step is given as groups of micro-batches: those of a group share a
perturbation, found along the mean of their gradients; the descent takes the mean over all. So one group is one large
batch, and groups of one are micro-batches (or processes) that perturb each for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from reference import Tensors, l2, project, sgd
from torch import Tensor, nn
from torch.func import functional_call

Batch = tuple[Tensor, Tensor]
Groups = Sequence[Sequence[Batch]]


def window_trajectory(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    steps: Iterable[Groups],
    *,
    lr: float,
    epsilon: float,
    inner_lr: float = 1.0,
    inner_iter: int = 1,
    norm: Literal["tensor", "global"] = "tensor",
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    transform: Callable[[Tensors, Tensors], Tensors] | None = None,
) -> list[Tensors]:
    """Train a float64 copy of `model`; returns the parameters after each step. Running statistics stay as they are.

    Args:
        model: called as `model(inputs)`.
        loss_fn: the mean loss of a micro-batch, `loss_fn(outputs, targets)`.
        steps: for each its groups of micro-batches, equal in number; a micro-batch counts the same whatever its size.
        lr, epsilon, inner_lr, inner_iter, norm, momentum, nesterov, weight_decay, clip_norm: see `amp_trajectory`.
        transform: called with the weights and the clipped descent gradient, returns the gradient for SGD.
    """
    model = copy.deepcopy(model).double()
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity: Tensors = {}
    trajectory = []

    def mean_gradient(group: Sequence[Batch], point: Tensors) -> Tensors:
        """Of a group; without the tensors that get none, and with zero for a batch where another has one."""
        total: Tensors = {}
        for inputs, targets in group:
            batch = [t.double() if t.is_floating_point() else t for t in (inputs, targets)]
            leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            loss = loss_fn(functional_call(model, {**leaves, **buffers}, (batch[0],)), batch[1])
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, g in zip(leaves, grads, strict=True):
                if g is not None:
                    total[name] = total.get(name, torch.zeros_like(g)) + g / len(group)
        return total

    for groups in steps:
        assert len({len(group) for group in groups}) == 1
        descent: Tensors = {}
        for group in groups:
            delta = {name: torch.zeros_like(p) for name, p in theta.items()}
            for _ in range(inner_iter):
                g = mean_gradient(group, {name: theta[name] + delta[name] for name in theta})
                delta = project({n: d + inner_lr * g[n] if n in g else d for n, d in delta.items()}, epsilon, norm)
            for name, g_amp in mean_gradient(group, {name: theta[name] + delta[name] for name in theta}).items():
                descent[name] = descent.get(name, torch.zeros_like(g_amp)) + g_amp / len(groups)
        if clip_norm is not None:
            factor = min(1.0, clip_norm / (l2(descent.values()) + 1e-6))  # the 1e-6 is clip_grad_norm_'s
            descent = {name: g * factor for name, g in descent.items()}
        if transform is not None:
            descent = transform(theta, descent)
        theta = sgd(theta, descent, velocity, lr, momentum, nesterov, weight_decay)
        trajectory.append(theta)
    return trajectory
