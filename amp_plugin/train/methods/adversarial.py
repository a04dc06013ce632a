"""The fast gradient sign method: the worst images nearby, to first order.

Source: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015,
https://arxiv.org/abs/1412.6572, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fast_gradient_sign(
    loss_of: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    epsilon: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """``images + epsilon * sign(gradient)``, no farther than black and white.

    Args:
        loss_of: of a batch of images; a scalar.
        images: normalised, (B, C, H, W).
        epsilon: length of the step in every pixel and channel, of pixels scaled to [0, 1].
        mean: per channel, of pixels scaled to [0, 1], that was subtracted.
        std: per channel, that they were then divided by.

    Returns:
        Normalised images of the same shape, dtype and memory format, without a graph.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(images), images)
    centre, scale = (images.new_tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    moved = images.detach() + epsilon / scale * gradient.sign()
    return torch.clamp(moved, (0.0 - centre) / scale, (1.0 - centre) / scale)
