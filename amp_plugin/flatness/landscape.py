"""The loss along random directions through the weights.

Source: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018,
https://arxiv.org/abs/1712.09913, section 4, and its released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from timm.utils.agc import unitwise_norm
from torch import Tensor

from amp_plugin.flatness.objective import Objective, progress_bar

Array = npt.NDArray[np.float64]
Vectors = Literal["fixed", "scaled"]


@dataclass(frozen=True, eq=False)
class Landscape:
    """Loss and error on a grid of points ``theta + a * first direction (+ b * second direction)``.

    Attributes:
        steps: (n,) values of a and of b; the middle value is 0, the weights themselves.
        loss: (n,) or (n, n) losses, indexed by a, then b; not finite where the network overflows.
        error: shares of wrong predictions in per cent, shaped as the losses; None if the model is no classifier.
    """

    steps: Array
    loss: Array
    error: Array | None


def filter_normalised_direction(parameters: Sequence[Tensor], seed: int, *, vectors: Vectors = "fixed") -> list[Tensor]:
    """Draw a random direction, every filter of which is as long as the filter of the weights.

    A step of 1 is then a change of 100% in every filter, and networks whose weights differ in scale can be compared
    (with BatchNorm, a network does not change when its filters grow, but a plain random direction's effect does).
    A filter is a slice along the first dimension: an output channel of a convolution, an output of a linear layer.

    Args:
        parameters: weights, e.g. ``objective.parameters``.
        seed: seed of the direction; models of one architecture get one direction from one seed.
        vectors: treatment of parameters of at most one dimension, which are biases and those of norm layers: "fixed"
            keeps them as they are (the paper's figures), "scaled" moves them along themselves (the released code's
            other choice).

    Raises:
        ValueError: ``vectors`` is unknown.
    """
    if vectors not in get_args(Vectors):
        raise ValueError(f"vectors must be one of {', '.join(map(repr, get_args(Vectors)))}, got {vectors!r}")
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for p in parameters:
        weights = p.detach()
        drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        if p.ndim <= 1:
            direction.append(weights.clone() if vectors == "scaled" else torch.zeros_like(weights))
        else:
            direction.append(drawn * unitwise_norm(weights) / unitwise_norm(drawn))  # type: ignore[no-untyped-call]
    return direction


@torch.no_grad()
def loss_landscape(
    objective: Objective, directions: Sequence[Sequence[Tensor]], *, span: float = 1.0, points: int = 21
) -> Landscape:
    """Evaluate loss and error at evenly spaced points around the weights, on a line or in the plane of two directions.

    Each of the ``points`` or ``points ** 2`` points costs a forward pass over the batches. The weights are put back to
    the exact bits, whatever happens.

    Args:
        objective: loss to evaluate.
        directions: one direction or two, each a list of tensors shaped as ``objective.parameters``.
        span: farthest step along each direction, both ways.
        points: odd number of points along each direction; the middle one is the weights.

    Raises:
        ValueError: there are not one or two directions, or points is not odd, or span is not positive.
    """
    if len(directions) not in (1, 2):
        raise ValueError(f"a landscape has one direction or two, got {len(directions)}")
    steps = grid_steps(span, points)
    shape = (points,) * len(directions)
    loss, error = np.empty(shape), np.empty(shape)
    indices = list(itertools.product(range(points), repeat=len(directions)))
    weights = [p.clone() for p in objective.parameters]
    try:
        for index in progress_bar(objective, indices, f"loss landscape, {len(directions)}-D"):
            for p, theta, *moves in zip(objective.parameters, weights, *directions, strict=True):
                p.copy_(sum((float(steps[i]) * move for i, move in zip(index, moves, strict=True)), theta))
            loss[index], error[index] = objective.evaluate()  # no error is NaN
    finally:
        torch._foreach_copy_(objective.parameters, weights)
    return Landscape(steps, loss, None if np.isnan(error).any() else error)


def grid_steps(span: float, points: int) -> Array:
    """Return the steps (points,) from -span to span; raise ValueError unless 0 is in the middle."""
    if points < 3 or points % 2 == 0 or not span > 0:
        raise ValueError(f"points must be odd and at least 3, span positive; got points={points}, span={span}")
    return span * np.arange(-(points // 2), points // 2 + 1) / (points // 2)
