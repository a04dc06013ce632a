"""All measures of one model, as JSON and, for several models side by side, as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from amp_plugin.core.norms import norms_of, overall_norm
from amp_plugin.core.perturbation import Norm
from amp_plugin.flatness.curvature import Eigenvalues, Trace, hessian_eigenvalues, hessian_trace
from amp_plugin.flatness.landscape import Landscape, filter_normalised_direction, grid_steps, loss_landscape
from amp_plugin.flatness.objective import Evaluation, Objective
from amp_plugin.flatness.sharpness import Sharpness, epsilon_sharpness
from amp_plugin.text import in_markdown

MEASURES = ("sharpness", "hessian", "line", "plane")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """Radius and norm of the ball, and the arguments of the measures that the options of the command set.

    Raises:
        ValueError: the points or the span make no grid.
    """

    epsilon: float
    norm: Norm = "tensor"
    steps: int = _setting(20, "Steps of the ascent in the ball.")
    eigenvalues: int = _setting(5, "Number of largest eigenvalues of the Hessian.")
    products: int = _setting(40, "Hessian-vector products for the eigenvalues.")
    probes: int = _setting(20, "Random vectors for the trace, each a Hessian-vector product.")
    span: float = _setting(1.0, "Farthest step along a direction; 1 is as long as the weights.")
    line_points: int = _setting(41, "Points along the line.")
    plane_points: int = _setting(21, "Points along each side of the plane.")
    seed: int = _setting(0, "Seed of the directions and of all other random numbers.")

    def __post_init__(self) -> None:
        for points in (self.line_points, self.plane_points):  # the grids are needed last, long after the start
            grid_steps(self.span, points)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures of one model; None for a measure that was not asked for."""

    evaluation: Evaluation  # loss and error at the weights
    weight_norm: float  # L2 norm of the weights, the scale that sharpness and curvature depend on
    sharpness: Sharpness | None = None
    eigenvalues: Eigenvalues | None = None
    trace: Trace | None = None
    line: Landscape | None = None  # along one direction
    plane: Landscape | None = None  # of two directions

    def as_dict(self) -> dict[str, Any]:
        """Convert the measures for JSON, with None for numbers that are not finite."""
        values = asdict(self) | {"evaluation": self.evaluation._asdict()}
        if self.sharpness is not None:
            values["sharpness"] |= {"sharpness": self.sharpness.sharpness, "worst_loss": self.sharpness.worst_loss}
        text = json.dumps({n: v for n, v in values.items() if v is not None}, default=np.ndarray.tolist)
        return dict(json.loads(text, parse_constant=lambda _: None))


def measure(objective: Objective, settings: MeasureSettings, which: tuple[str, ...] = MEASURES) -> Measures:
    """Make some of the `MEASURES` of one model; the plane's second direction is drawn with the next seed."""
    found: dict[str, Any] = {}
    seed = settings.seed
    if "sharpness" in which:
        ball = {"norm": settings.norm, "steps": settings.steps, "seed": seed}
        found["sharpness"] = epsilon_sharpness(objective, settings.epsilon, **ball)  # type: ignore[arg-type]
    if "hessian" in which:
        k = settings.eigenvalues
        found["eigenvalues"] = hessian_eigenvalues(objective, k, products=settings.products, seed=seed)
        found["trace"] = hessian_trace(objective, probes=settings.probes, seed=seed)
    for name, count, points in (("line", 1, settings.line_points), ("plane", 2, settings.plane_points)):
        if name in which:
            directions = [filter_normalised_direction(objective.parameters, seed + i) for i in range(count)]
            found[name] = loss_landscape(objective, directions, span=settings.span, points=points)
    norm = overall_norm([norms_of([p.detach()]) for p in objective.parameters])
    return Measures(evaluation=objective.evaluate(), weight_norm=float(norm), **found)


def measures_table(measured: Mapping[str, Measures], more: Mapping[str, Mapping[str, str]]) -> str:
    """Put models side by side, as a Markdown table; ``more`` has further rows by title, with the models' cells."""
    rows: dict[str, dict[str, str]] = {}

    def tell(row: str, model: str, cell: str) -> None:
        rows.setdefault(row, {})[model] = cell

    for name, found in measured.items():
        tell("training loss (nats)", name, f"{found.evaluation.loss:.4g}")
        if found.evaluation.error is not None:
            tell("training error (%)", name, f"{found.evaluation.error:.2f}")
        if found.sharpness is not None:
            tell("worst loss in the ball (nats)", name, f"{found.sharpness.worst_loss:.4g}")
            tell("**sharpness (nats)**", name, f"**{found.sharpness.sharpness:.4g}**")
        if found.eigenvalues is not None:
            pairs = zip(found.eigenvalues.values, found.eigenvalues.residuals, strict=True)
            for i, (value, residual) in enumerate(pairs, 1):
                tell(f"Hessian eigenvalue {i}", name, f"{value:.4g} ± {residual:.1g}")
        if found.trace is not None:
            tell("Hessian trace", name, f"{found.trace.value:.4g} ± {found.trace.standard_error:.1g}")
        tell("norm of the weights", name, f"{found.weight_norm:.4g}")
    names = list(measured)
    lines = [["", *map(in_markdown, names)], ["---"] + ["---:"] * len(names)]
    lines += [[row, *(cells.get(name, "") for name in names)] for row, cells in {**rows, **more}.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
