"""AMP, slowly and plainly, in float64: what the package's implementation is compared with.

Written from the pseudo-code of the paper (Zheng, Zhang, Mao, CVPR 2021, https://arxiv.org/abs/2010.04925),
which `amp_trajectory` quotes line by line. It shares no code with the package, and none with `torch.optim`.
The loss must be a deterministic function of the weights and the batch: no dropout, no random augmentation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One optimizer step: what it saw, and where it ended. Tensors are keyed by parameter or buffer name."""

    loss: float  # at theta, before the step
    amp_loss: float  # at theta + delta, before the step
    delta: Tensors
    params: Tensors  # theta after the step
    buffers: Tensors  # running statistics after the step

    @property
    def delta_norms(self) -> dict[str, float]:
        """L2 norm of the perturbation of each tensor."""
        return {name: l2([d]) for name, d in self.delta.items()}


def l2(tensors: Iterable[Tensor]) -> float:
    """L2 norm of all entries of all tensors together."""
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def project(delta: Tensors, epsilon: float, norm: Literal["tensor", "global"]) -> Tensors:
    """`delta * min(1, epsilon / ||delta||)`, with a norm for each tensor, or one norm for all of them."""

    def shrink(size: float) -> float:
        return 1.0 if size <= epsilon else epsilon / size  # so 0 / 0 is not computed

    if norm == "global":
        factor = shrink(l2(delta.values()))
        return {name: d * factor for name, d in delta.items()}
    return {name: d * shrink(l2([d])) for name, d in delta.items()}


def sgd(
    theta: Tensors,
    grads: Tensors,
    velocity: Tensors,
    lr: float,
    momentum: float,
    nesterov: bool,
    decay: float,
) -> Tensors:
    """SGD as torch defines it, updating `velocity` in place. A tensor without gradient stays put."""
    new = dict(theta)
    for name, grad in grads.items():
        g = grad + decay * theta[name]
        velocity[name] = momentum * velocity.get(name, torch.zeros_like(g)) + g
        new[name] = theta[name] - lr * (g + momentum * velocity[name] if nesterov else velocity[name])
    return new


def amp_trajectory(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
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
    batch_norm: Literal["clean", "all"] = "clean",
) -> list[Step]:
    """Train a float64 copy of `model` with AMP around SGD, one step for each batch; `model` is not touched.

    Args:
        model: called as `model(inputs)`, in the mode (train or eval) it is in. Parameters that require no
            gradient, or get none, are left out of the ball and of the step.
        loss_fn: the mean loss of a batch, `loss_fn(outputs, targets)`.
        batches: pairs (inputs, targets).
        lr: learning rate of the descent.
        epsilon: radius of the ball.
        inner_lr: the paper's zeta.
        inner_iter: the paper's N, at least 1.
        norm: one ball for each tensor (the released code) or one for all parameters (the paper's text).
        momentum: of the descent.
        nesterov: of the descent.
        weight_decay: of the descent, on all parameters.
        clip_norm: largest global norm of the descent gradient, as `torch.nn.utils.clip_grad_norm_` clips.
        batch_norm: which passes update the running statistics: the one at theta, or all N + 1.
    """
    model = copy.deepcopy(model).double()
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    velocity: Tensors = {}
    steps = []

    def mean_loss(batch: tuple[Tensor, Tensor], point: Tensors, is_clean: bool) -> tuple[float, Tensors]:
        """Loss at `point` and its gradients, without the tensors that get none."""
        inputs, targets = (t.double() if t.is_floating_point() else t for t in batch)
        leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
        # A forward updates the statistics it is handed in place; scratch copies take the unwanted updates.
        scratch = {name: b.clone() for name, b in buffers.items()}
        statistics = buffers if is_clean or batch_norm == "all" else scratch
        loss = loss_fn(functional_call(model, {**leaves, **statistics}, (inputs,)), targets)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.item(), {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}

    for batch in batches:
        # delta = 0
        delta = {name: torch.zeros_like(p) for name, p in theta.items()}
        losses = []
        # repeat inner_iter (N) times:
        for i in range(inner_iter):
            # g = grad of the mean loss over B at theta + delta
            loss, g = mean_loss(batch, {name: theta[name] + delta[name] for name in theta}, is_clean=i == 0)
            losses.append(loss)
            # delta = delta + inner_lr * g
            delta = {name: d + inner_lr * g[name] if name in g else d for name, d in delta.items()}
            # delta = delta * min(1, epsilon / ||delta||)
            delta = project(delta, epsilon, norm)
        # g_amp = grad of the mean loss over B at theta + delta
        amp_loss, g_amp = mean_loss(batch, {name: theta[name] + delta[name] for name in theta}, is_clean=False)
        if clip_norm is not None:
            factor = min(1.0, clip_norm / (l2(g_amp.values()) + 1e-6))  # the 1e-6 is clip_grad_norm_'s
            g_amp = {name: g * factor for name, g in g_amp.items()}
        # theta = base_optimizer(theta, g_amp): weight decay and momentum act here, at theta
        theta = sgd(theta, g_amp, velocity, lr, momentum, nesterov, weight_decay)
        statistics = {name: b.clone() for name, b in buffers.items()}
        steps.append(Step(losses[0], amp_loss, delta, theta, statistics))
    return steps
