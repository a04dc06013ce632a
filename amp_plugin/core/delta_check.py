"""A look at whether the passes of a loop see delta at all: master copies of the weights, or a cache, may hide it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.bucket import Ascent
from amp_plugin.core.norms import norms_of, overall_norm
from amp_plugin.core.perturbation import Perturbation
from amp_plugin.core.sharding import is_distributed

_SMALL = 1e-3  # a displacement below this share of the weights may change no gradient that float32 can show


class DeltaCheck:
    """Compares, in the first step that ascends, the gradients at theta and at theta + delta.

    Norms are compared, up to one common factor, which a loop that clips or unscales puts in. The host reads the verdict
    one step later, so it does not wait.
    """

    def __init__(self) -> None:
        self._params: list[TensorWeakRef] = []
        self._norms: Tensor | None = None
        self._verdict: AsyncScalar | None = None
        self._over = False

    @torch.no_grad()
    def ascend(self, ascents: Sequence[Ascent]) -> None:
        """Take the gradients at theta, before an ascent consumes them."""
        if self._over or self._norms is not None:
            return
        found = [(a.param, a.grad) for a in ascents if a.grad is not None and not is_distributed(a.param)]
        device = found[0][0].device if found else None
        found = [(p, g) for p, g in found if p.device == device and g.layout == torch.strided and not g.is_complex()]
        if len(found) < 2:  # one norm alone is always proportional
            self._over = True
            return
        self._params = [TensorWeakRef(p) for p, _ in found]
        self._norms = _norms([g for _, g in found])

    @torch.no_grad()
    def descend(self, perturbation: Perturbation) -> None:
        """Take the gradients at theta + delta, and the length of delta."""
        norms, self._norms = self._norms, None
        if norms is None or self._over:
            return
        delta = perturbation.statistics()["perturbation_norm"]
        self._over = True
        params = [p for ref in self._params if (p := ref()) is not None]
        grads = [p.grad for p in params]
        if len(params) < len(self._params) or any(g is None or g.layout != torch.strided for g in grads):
            return
        weights = overall_norm([_norms([p]) for p in params])
        ratios = _norms([g for g in grads if g is not None]) / norms
        there = norms > 0
        largest = torch.where(there, ratios, -torch.inf).max()
        smallest = torch.where(there, ratios, torch.inf).min()
        alike = (largest > 0) & (largest - smallest <= 1e-6 * largest)
        self._verdict = AsyncScalar(alike & (delta.to(weights) > _SMALL * weights))

    def was_unseen(self) -> bool:
        """Return, once, whether the gradients of the two points were the same."""
        verdict, self._verdict = self._verdict, None
        return verdict is not None and bool(verdict.value())


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.cat([norms_of([t]) for t in tensors])
