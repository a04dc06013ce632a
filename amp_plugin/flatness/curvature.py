"""The largest eigenvalues and the trace of the loss's Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amp_plugin.flatness.objective import Objective, progress_bar


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of a Hessian.

    Attributes:
        values: (k,) eigenvalues, the largest first.
        residuals: (k,) bounds of the distance of each value from an eigenvalue of the Hessian, up to the rounding of
            the products; at least the rounding of the largest value.
        products: number of Hessian-vector products that were made.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    products: int


@dataclass(frozen=True)
class Trace:
    """The trace of a Hessian, the sum of its eigenvalues.

    Attributes:
        value: estimate of the trace.
        standard_error: standard error of the estimate, over the probes.
        probes: number of random vectors, each of which took one Hessian-vector product.
    """

    value: float
    standard_error: float
    probes: int


def hessian_eigenvalues(objective: Objective, k: int = 5, *, products: int = 40, seed: int = 0) -> Eigenvalues:
    """Compute the largest eigenvalues of the loss's Hessian, by the Lanczos method with full reorthogonalisation.

    Eigenvalues that are exactly equal count once. The vectors of all products are kept, which takes ``products`` times
    the memory of the weights.

    Args:
        objective: loss to differentiate.
        k: number of eigenvalues.
        products: largest number of Hessian-vector products over all batches; more make the residuals smaller.
        seed: seed of the first vector.

    Raises:
        ImportError: hessian-eigenthings is missing (``pip install "amp-plugin[flatness]"``).
        ValueError: k is not in [1, number of weights], or products less than k.
    """
    library = require_library()
    with _operator(objective, library, "Hessian eigenvalues", products) as operator:
        if not 1 <= k <= operator.size or products < k:
            raise ValueError(
                f"k must be from 1 to the number of weights, {operator.size}, and products at least k; got k={k},"
                f" products={products}"
            )
        found = library.lanczos(
            operator, k=k, max_iter=min(products, operator.size), reorthogonalize=True, which="LA", seed=seed
        )
    rounding = torch.finfo(operator.dtype).eps * found.eigenvalues.abs().max()
    residuals = found.residuals.clamp(min=rounding)
    return Eigenvalues(tuple(found.eigenvalues.tolist()), tuple(residuals.tolist()), found.iterations)


def hessian_trace(objective: Objective, *, probes: int = 20, seed: int = 0) -> Trace:
    """Estimate the trace of the loss's Hessian, by Hutchinson's estimator with vectors of random signs.

    Args:
        objective: loss to differentiate.
        probes: number of random vectors, at least 2; each takes a Hessian-vector product over all batches.
        seed: seed of the random vectors.

    Raises:
        ImportError: hessian-eigenthings is missing (``pip install "amp-plugin[flatness]"``).
        ValueError: there are fewer than 2 probes, so there is no standard error.
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    library = require_library()
    with _operator(objective, library, "Hessian trace", probes) as operator:
        found = library.trace(operator, num_matvecs=probes, method="hutchinson", seed=seed)
    return Trace(found.estimate, found.stderr, probes)


def require_library() -> Any:
    """Return the module hessian_eigenthings; raise ImportError with the command that installs it if it is missing."""
    try:
        import hessian_eigenthings
    except ImportError as error:
        raise ImportError(
            'the Hessian needs hessian-eigenthings: pip install "amp-plugin[flatness]"', name="hessian_eigenthings"
        ) from error
    return hessian_eigenthings


@contextmanager
def _operator(objective: Objective, library: Any, what: str, products: int) -> Iterator[Any]:
    """Wrap the Hessian for the library, as a function of one flat vector."""
    parameters = objective.parameters
    first = parameters[0]
    sizes = [p.numel() for p in parameters]

    def product(vector: Tensor) -> Tensor:
        pieces = zip(torch.split(vector, sizes), parameters, strict=True)
        result = objective.hessian_product([piece.view_as(p).to(p) for piece, p in pieces])
        bar.update()
        return torch.cat([r.flatten().to(first) for r in result])

    with progress_bar(objective, None, what, total=products) as bar:
        yield library.LambdaOperator(product, sum(sizes), first.device, first.dtype)
