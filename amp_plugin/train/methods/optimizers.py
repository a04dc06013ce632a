"""SAM, ASAM and random model perturbation: AMP with other displacements."""

from __future__ import annotations

from typing import Any

import torch

from amp_plugin import AMP
from amp_plugin.train.methods.sphere import AdaptiveSphere, Sphere


class SAM(AMP):
    """Sharpness-Aware Minimization: always to the surface of the ball; `epsilon` is its rho.

    The paper has one ball for all parameters, ``norm="global"``.

    Source: Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412.
    """

    _ball = Sphere


class ASAM(AMP):
    """Adaptive SAM: the same in a ball whose axes are as long as the weights; `epsilon` is its rho.

    Source: Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, with eta = 0 as in most implementations.
    """

    _ball = AdaptiveSphere


class RMP(AMP):
    """Random model perturbation: a random direction to the surface of the ball, in place of the gradient's.

    :meth:`perturb` takes the place of the first pass and of `ascend`; so a step has one pass, at theta + delta.
    The AMP paper's baseline, https://arxiv.org/abs/2010.04925, section 5.
    """

    _ball = Sphere

    @torch.no_grad()
    def perturb(self, seed: int) -> None:
        """Move every parameter along Gaussian noise, uniform in direction, to the surface of its ball.

        Args:
            seed: the noise is a function of it, of the parameters' shapes and of the kind of device; in [0, 2**64).
        """
        generators: dict[torch.device, torch.Generator] = {}
        for p in self._params():
            if p.requires_grad:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(seed)
                p.grad = torch.empty_like(p).normal_(generator=generators[p.device])
        super().ascend()

    def ascend(self, **kwargs: Any) -> None:
        """Refused: the direction is not the gradient's."""
        raise RuntimeError("RMP does not ascend along a gradient: call perturb(seed), backward() and step()")

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """The base optimizer's step at theta with the gradient taken after :meth:`perturb`.

        Raises:
            RuntimeError: there is a closure, or no :meth:`perturb` before.
        """
        if closure is not None:
            raise RuntimeError("RMP's step takes no closure: call perturb(seed), backward() and step()")
        return super().step()


RIVALS: dict[str, type[AMP]] = {"rmp": RMP, "sam": SAM, "asam": ASAM}
