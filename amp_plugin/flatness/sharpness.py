"""Sharpness: the rise of the loss within the ball, which AMP minimises.

Source: Zheng, Zhang, Mao, "Regularizing Neural Networks via Adversarial Model Perturbation", CVPR 2021,
https://arxiv.org/abs/2010.04925, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amp_plugin.core.bucket import Ascent
from amp_plugin.core.norms import norms_of, overall_norm
from amp_plugin.core.perturbation import Norm, Perturbation
from amp_plugin.flatness.objective import Objective, progress_bar


@dataclass(frozen=True)
class Sharpness:
    """Result of :func:`epsilon_sharpness`.

    Attributes:
        epsilon: radius of the ball, in the units of the weights.
        norm: norm of the ball, see `amp_plugin.AMP`.
        losses: losses at the weights and after each step of the ascent.
    """

    epsilon: float
    norm: Norm
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Loss at the weights."""
        return self.losses[0]

    @property
    def worst_loss(self) -> float:
        """Highest loss that the ascent has met in the ball."""
        return max(self.losses)

    @property
    def sharpness(self) -> float:
        """Difference ``worst_loss - loss``, at least 0."""
        return self.worst_loss - self.loss


def epsilon_sharpness(
    objective: Objective,
    epsilon: float,
    *,
    norm: Norm = "tensor",
    steps: int = 20,
    step_length: float = 0.25,
    seed: int = 0,
) -> Sharpness:
    """Climb from the weights to the worst loss in the ball around them, by projected gradient ascent.

    AMP's own step is ``inner_lr`` times the gradient. Here all steps have one length, relative to the ball, so that
    models are compared at one distance, however small their gradients have become. The weights are put back to the
    exact bits, whatever happens.

    The ascent costs ``steps`` forward and backward passes over all batches and a forward pass. The result is a lower
    bound of the worst loss; more steps can only raise it.

    Args:
        objective: loss to climb.
        epsilon: radius of the ball, in the units of the weights.
        norm: "tensor" for a ball around every parameter tensor, or "global" for one ball around all of them together.
        steps: number of steps of the ascent.
        step_length: length of a step, in units of epsilon.
        seed: seed of the direction that is taken where the gradient is exactly zero.

    Raises:
        ValueError: an argument is out of range, or the loss or its gradient is not finite.
    """
    for name, value in {"epsilon": epsilon, "steps": steps, "step_length": step_length}.items():
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name} must be positive, got {value}")
    ball = Perturbation(norm)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    try:
        for _ in progress_bar(objective, range(steps), "sharpness"):
            loss, grads = objective.gradient()
            losses.append(_finite(loss, len(losses), epsilon))
            pairs = zip(objective.parameters, _directions(grads, norm, generator), strict=True)
            ball.ascend(Ascent(p, direction, step_length * epsilon, epsilon) for p, direction in pairs)
            if not ball.was_finite():
                raise ValueError(f"the gradient after {len(losses) - 1} steps of the ascent is not finite")
        losses.append(_finite(objective.evaluate().loss, steps, epsilon))
    finally:
        ball.restore()
    return Sharpness(epsilon, norm, tuple(losses))


def _finite(loss: float, step: int, epsilon: float) -> float:
    if not math.isfinite(loss):
        where = f"after {step} steps of the ascent: try an epsilon below {epsilon}" if step else "at the weights"
        raise ValueError(f"the loss is {loss} {where}")
    return loss


def _directions(grads: list[Tensor | None], norm: Norm, generator: torch.Generator) -> list[Tensor | None]:
    """Scale the gradients to unit length, each one, or all of them together if they share one ball."""
    present = [g for g in grads if g is not None]
    balls = [present] if norm == "global" else [[g] for g in present]
    units = iter([unit for ball in balls if ball for unit in _unit(ball, generator)])
    return [None if g is None else next(units) for g in grads]


def _unit(vector: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    largest = max(float(v.abs().max()) for v in vector)
    if largest == 0:
        vector = [torch.randn(v.shape, dtype=v.dtype, generator=generator).to(v.device) for v in vector]
        largest = 1.0
    vector = [v / largest for v in vector]  # without this, the squares of tiny numbers would be 0
    size = overall_norm([norms_of([v]) for v in vector])
    return [v / size.to(v.device) for v in vector]
