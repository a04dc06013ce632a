"""AMP for language models, slowly and plainly, in float64: what `AMPTrainer` is compared with.

The paper's pseudo-code (the ball and SGD are those of `reference.py`), driven by the loss of a whole accumulation
window. The loss is computed here, from the logits alone: the model's own loss, the Trainer's count of tokens and
`torch.optim` have no part in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from reference import Step, Tensors, l2, project, sgd
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Batch = dict[str, Tensor]
MicroBatch = Sequence[Batch]  # in pieces that are run one by one: the batch as it is, or its documents
Update = Callable[[Tensors, Tensors, float], Tensors]  # (theta, gradients, weight decay) to the new theta


@dataclass(frozen=True)
class Objective:
    """The loss of an accumulation window.

    Attributes:
        shift: position i predicts label i + 1.
        mean_over: all targets of the window (what `num_items_in_batch` is for); or those of each micro-batch, and
            then over the micro-batches.
        smoothing: label smoothing factor.
    """

    shift: bool = True
    mean_over: Literal["window", "micro-batch"] = "window"
    smoothing: float = 0.0

    def __call__(self, logits_of: Callable[[Batch], Tensor], window: Sequence[MicroBatch]) -> Tensor:
        sums, counts = [], []
        for pieces in window:
            targets = [piece["labels"][..., 1:] if self.shift else piece["labels"] for piece in pieces]
            counts.append(sum(int((t != -100).sum()) for t in targets))
            sums.append(sum(self._sum(logits_of(p), t) for p, t in zip(pieces, targets, strict=True)))
        if self.mean_over == "window":
            return sum(sums) / sum(counts)
        return sum(s / n for s, n in zip(sums, counts, strict=True)) / len(window)

    def _sum(self, logits: Tensor, targets: Tensor) -> Any:
        logits = logits[..., :-1, :] if self.shift else logits
        return F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), label_smoothing=self.smoothing, reduction="sum"
        )


def nesterov(lr: float) -> Update:
    """SGD with Nesterov momentum 0.9."""
    velocity: Tensors = {}
    return lambda theta, grads, decay: sgd(theta, grads, velocity, lr, 0.9, True, decay)


def adamw(lr: float, eps: float) -> Update:
    """AdamW (Loshchilov, Hutter, https://arxiv.org/abs/1711.05101, algorithm 2) with betas 0.9 and 0.999."""
    moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def update(theta: Tensors, grads: Tensors, decay: float) -> Tensors:
        new = dict(theta)
        for name, g in grads.items():
            m, v, t = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g), 0))
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
            moments[name] = m, v, t
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
            new[name] = theta[name] - lr * (step + decay * theta[name])
        return new

    return update


def language_trajectory(
    model: nn.Module,
    windows: Sequence[Sequence[MicroBatch]],
    objective: Objective,
    update: Update,
    *,
    epsilon: float,
    inner_lr: float,
    inner_iter: int = 1,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    masks: Literal["same", "fresh"] = "same",
) -> list[Step]:
    """Train a float64 copy of `model`, one step for each window; `model` is not touched.

    Args:
        model: called with a batch's entries; gives `.logits`. Parameters that require no gradient stay as they are.
        windows: micro-batches of each step.
        objective: the loss of a window.
        update: the base optimizer.
        epsilon: radius of the ball around each tensor.
        inner_lr: the paper's zeta.
        inner_iter: the paper's N; 0 is the base optimizer alone.
        weight_decay: on matrices that are no bias; the others have none, as in the Trainer.
        clip_norm: largest global norm of the descent gradient, as `torch.nn.utils.clip_grad_norm_` clips.
        masks: of dropout: every pass of step s draws from `torch.manual_seed(s)`, or the first one alone does.
    """
    model = copy.deepcopy(model).double().train()
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss_and_gradients(point: Tensors, window: Sequence[MicroBatch]) -> tuple[float, Tensors]:
        leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
        loss = objective(lambda batch: functional_call(model, leaves, (), dict(batch)).logits, window)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.item(), {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}

    steps = []
    for number, window in enumerate(windows):
        torch.manual_seed(number)
        delta = {name: torch.zeros_like(p) for name, p in theta.items()}
        losses = []
        for _ in range(inner_iter):
            loss, grads = loss_and_gradients({n: theta[n] + delta[n] for n in theta}, window)
            losses.append(loss)
            delta = project({n: d + inner_lr * grads.get(n, 0.0) for n, d in delta.items()}, epsilon, "tensor")
            if masks == "same":
                torch.manual_seed(number)
        loss, grads = loss_and_gradients({n: theta[n] + delta[n] for n in theta}, window)
        losses.append(loss)
        factor = min(1.0, clip_norm / (l2(grads.values()) + 1e-6))  # the 1e-6 is clip_grad_norm_'s
        decayed = {n for n, g in grads.items() if g.ndim > 1 and "bias" not in n}
        for names, decay in ((decayed, weight_decay), (grads.keys() - decayed, 0.0)):
            theta = update(theta, {n: grads[n] * factor for n in names}, decay)
        steps.append(Step(losses[0], losses[-1], delta, theta, {}))
    return steps
