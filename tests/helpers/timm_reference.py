"""What timm's train.py does beside AMP, written anew in float64 for the reference of `windows.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reference import Tensors, l2
from torch import Tensor
from torch.nn import functional as F


def smoothed_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """With label smoothing for class numbers; mixed targets are smoothed already."""
    return F.cross_entropy(outputs, targets, label_smoothing=0.0 if targets.is_floating_point() else 0.1)


def unit_norms(t: Tensor) -> Tensor:
    """Of each output unit's weights; a vector is one unit."""
    return t.square().sum(list(range(1, t.ndim)) or [0], keepdim=True).sqrt()


def clipped_and_decayed(mode: str | None, limit: float, weight_decay: float) -> Callable[[Tensors, Tensors], Tensors]:
    """How the descent gradient is changed, given the weights, before SGD sees it.

    Args:
        mode: "value", "agc" (https://arxiv.org/abs/2102.06171, the head is spared), or any other for none here.
        limit: of the values, or of the ratio of the norms of a unit's gradient and weights.
        weight_decay: of all weights but vectors and what a vision transformer wants to have spared.
    """

    def transform(theta: Tensors, grads: Tensors) -> Tensors:
        new = {}
        for name, g in grads.items():
            t = theta[name]
            if mode == "value":
                g = g.clamp(-limit, limit)
            elif mode == "agc" and not name.startswith("head."):
                g = g * (limit * unit_norms(t).clamp(min=1e-3) / unit_norms(g)).clamp(max=1.0)
            decays = t.ndim > 1 and name not in ("pos_embed", "cls_token")
            new[name] = g + weight_decay * t if decays else g
        return new

    return transform


def averages(start: Tensors, trajectory: Sequence[Tensors], decay: float) -> list[Tensors]:
    """Exponential moving averages of the weights, after each step."""
    average, seen = {name: p.double() for name, p in start.items()}, []
    for theta in trajectory:
        average = {name: decay * a + (1 - decay) * theta[name] for name, a in average.items()}
        seen.append(average)
    return seen


def assert_trajectory(seen: Sequence[Tensors], want: Sequence[Tensors], start: Tensors, tolerance: float) -> None:
    """The way from the start, after each step: the distance between the two, in parts of its length."""
    for step, (a, b) in enumerate(zip(seen, want, strict=True)):
        assert a.keys() == b.keys()
        distance = l2(a[name].double() - b[name].double() for name in b)
        way = l2(b[name].double() - start[name].double() for name in b)
        assert distance < tolerance * way, f"step {step}: off by {distance / way:.1e} of the way"
