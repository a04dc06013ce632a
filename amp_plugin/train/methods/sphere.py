"""Displacements that always reach the surface of the ball, however small the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from amp_plugin.core.perturbation import Perturbation


class Sphere(Perturbation):
    """The ball's surface: ``delta = epsilon * grad / ||grad||``; a zero gradient moves nothing."""

    def statistics(self) -> dict[str, Tensor]:
        """``perturbation_norm`` of the last step; that the ball held it back would say nothing."""
        return {name: value for name, value in super().statistics().items() if name != "clipped"}

    def _share(self, length: Tensor) -> Tensor:
        return torch.where(length >= torch.finfo(length.dtype).tiny, length.reciprocal(), 0.0)


class AdaptiveSphere(Sphere):
    """The same where a weight's share is measured in units of its own size: ``||delta / |theta||| = epsilon``.

    So ``delta = epsilon * theta**2 * grad / ||theta * grad||``, and ``perturbation_norm`` is in those units. For one
    ascent step: a second one would weigh the first again.

    Source: Kwon et al., "ASAM", ICML 2021, https://arxiv.org/abs/2102.11600, equation 8 with eta = 0.
    """

    def _weigh(self, deltas: list[Tensor], theta: list[Tensor]) -> None:
        torch._foreach_mul_(deltas, torch._foreach_abs(theta))
