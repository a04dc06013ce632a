"""Define SAM, ASAM and random model perturbation as AMP with other displacements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from amp_plugin import AMP
from amp_plugin.core.perturbation import Perturbation
from amp_plugin.core.policies.policy import CountsSteps


class Sphere(Perturbation):
    """Move to the ball's surface, ``delta = epsilon * grad / ||grad||``; a zero gradient moves nothing."""

    def statistics(self) -> dict[str, Tensor]:
        """Return ``perturbation_norm`` of the last step; the share of clipped tensors would say nothing."""
        return {name: value for name, value in super().statistics().items() if name != "clipped"}

    def _share(self, length: Tensor) -> Tensor:
        return torch.where(length >= torch.finfo(torch.float32).tiny, length.reciprocal(), 1.0)


class AdaptiveSphere(Sphere):
    """Move to the surface where each weight's share is in units of its own size: ``||delta / |theta||| = epsilon``.

    So ``delta = epsilon * theta**2 * grad / ||theta * grad||``, and ``perturbation_norm`` is in those units. The class
    is for one ascent step: a second step would weigh the first again.
    """

    def _weigh(self, deltas: list[Tensor], theta: list[Tensor]) -> None:
        torch._foreach_mul_(deltas, torch._foreach_abs(theta))


class SAM(AMP):
    """Minimise by Sharpness-Aware Minimization, which always moves to the surface of the ball; `epsilon` is its rho.

    The paper has one ball for all parameters, ``norm="global"``.

    Source: Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412.
    """

    _perturbation_class = Sphere


class ASAM(AMP):
    """Minimise by adaptive SAM, in a ball whose axes are as long as the weights; `epsilon` is its rho.

    Source: Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, equation 8 with eta = 0 as in most
    implementations.
    """

    _perturbation_class = AdaptiveSphere


class RMP(AMP):
    """Move in a random direction to the surface of the ball, in place of the gradient's direction.

    So a step has one pass, at theta + delta. The noise has a seed in [0, 2**64). The AMP paper compares with random
    model perturbation, https://arxiv.org/abs/2010.04925, section 5.
    """

    _perturbation_class = Sphere

    def __init__(self, params: ParamsT, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(params, **kwargs, ascent=RandomDirection(seed))


@dataclass
class RandomDirection(CountsSteps):
    """Ascend along Gaussian noise, uniform in direction.

    The noise is a function of the seed, the number of the step, the parameters' shapes and layouts and the kind of
    device, so every process and a resumed run draw equal noise.
    """

    seed: int = 0
    name = "random"
    cost = 0.0

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Draw the noise for the parameters that are trained."""
        entropy = np.random.SeedSequence([self.seed, base.param_groups[0]["ascent_step"]])
        key = int(entropy.generate_state(1, np.uint64)[0])
        trained = [p for p in ball if p.requires_grad]
        generators = {device: torch.Generator(device).manual_seed(key) for device in {p.device for p in trained}}
        return {p: torch.empty_like(p).normal_(generator=generators[p.device]) for p in trained}


BASELINES: dict[str, type[AMP]] = {"rmp": RMP, "sam": SAM, "asam": ASAM}
