"""SAM, ASAM and random model perturbation: AMP with other displacements."""

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
from amp_plugin.core.policies.policy import CountsSteps
from amp_plugin.train.methods.sphere import AdaptiveSphere, Sphere


class SAM(AMP):
    """Sharpness-Aware Minimization: always to the surface of the ball; `epsilon` is its rho.

    The paper has one ball for all parameters, ``norm="global"``.

    Source: Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412.
    """

    _perturbation_class = Sphere


class ASAM(AMP):
    """Adaptive SAM: the same in a ball whose axes are as long as the weights; `epsilon` is its rho.

    Source: Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, with eta = 0 as in most implementations.
    """

    _perturbation_class = AdaptiveSphere


class RMP(AMP):
    """Random model perturbation: a random direction to the surface of the ball, in place of the gradient's.

    So a step has one pass, at theta + delta. The AMP paper's baseline, https://arxiv.org/abs/2010.04925, section 5.

    Args:
        params: of `AMP`.
        seed: of the noise, in [0, 2**64).
        **kwargs: of `AMP`.
    """

    _perturbation_class = Sphere

    def __init__(self, params: ParamsT, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(params, **kwargs, ascent=RandomDirection(seed))


@dataclass
class RandomDirection(CountsSteps):
    """Ascend along Gaussian noise, uniform in direction.

    It is a function of the seed, the number of the step, the parameters' shapes and layouts and the kind of device: the
    same in every process, and in a run that is resumed.
    """

    seed: int = 0
    name = "random"
    cost = 0.0

    def directions(self, base: Optimizer, ball: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """The noise, for parameters that are trained."""
        entropy = np.random.SeedSequence([self.seed, base.param_groups[0]["ascent_step"]])
        key = int(entropy.generate_state(1, np.uint64)[0])
        generators: dict[torch.device, torch.Generator] = {}
        noise = {}
        for p in ball:
            if p.requires_grad:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(key)
                noise[p] = torch.empty_like(p).normal_(generator=generators[p.device])
        return noise


RIVALS: dict[str, type[AMP]] = {"rmp": RMP, "sam": SAM, "asam": ASAM}
