"""All measures of one model, as JSON and, for several models side by side, as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np

from amp_plugin.core.norms import norms_of, overall_norm
from amp_plugin.core.perturbation import NORMS, Norm
from amp_plugin.flatness.curvature import Eigenvalues, Trace, hessian_eigenvalues, hessian_trace
from amp_plugin.flatness.landscape import Landscape, filter_normalised_direction, grid_steps, loss_landscape
from amp_plugin.flatness.objective import Evaluation, Objective
from amp_plugin.flatness.sharpness import Sharpness, epsilon_sharpness
from amp_plugin.intervals import demand
from amp_plugin.text import in_markdown

MEASURES = ("sharpness", "hessian", "line", "plane")


def _setting(default: Any, interval: str, text: str) -> Any:
    return field(default=default, metadata={"interval": interval, "help": text})


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """Radius and norm of the ball, and the arguments of the measures that the options of the command set.

    Raises:
        ValueError: a setting is out of its range, or the settings do not fit together.
    """

    epsilon: float = field(metadata={"interval": "(0, inf)"})
    norm: Norm = "tensor"
    steps: int = _setting(20, "[1, inf)", "Steps of the ascent in the ball.")
    eigenvalues: int = _setting(5, "[1, inf)", "Number of largest eigenvalues of the Hessian.")
    products: int = _setting(40, "[1, inf)", "Hessian-vector products for the eigenvalues.")
    probes: int = _setting(20, "[2, inf)", "Random vectors for the trace, each a Hessian-vector product.")
    span: float = _setting(1.0, "(0, inf)", "Farthest step along a direction; 1 is as long as the weights.")
    line_points: int = _setting(41, "[3, 1000000]", "Points along the line.")
    plane_points: int = _setting(21, "[3, 10000]", "Points along each side of the plane.")
    seed: int = _setting(0, "[0, inf)", "Seed of the directions and of all other random numbers.")

    def __post_init__(self) -> None:
        for name, interval in INTERVALS.items():
            value = getattr(self, name)
            if not isinstance(value, float | int) or (must := demand(interval, value)):
                raise ValueError(
                    f"{name} must be {must if isinstance(value, float | int) else 'a number'}, got {value}"
                )
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.products < self.eigenvalues:
            raise ValueError(f"products must be at least as many as eigenvalues, got {self.products}")
        for points in (self.line_points, self.plane_points):  # the grids are needed last, long after the start
            grid_steps(self.span, points)


INTERVALS = {f.name: f.metadata["interval"] for f in fields(MeasureSettings) if "interval" in f.metadata}


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


def measure(
    objective: Objective,
    settings: MeasureSettings,
    which: Sequence[str] = MEASURES,
    attempt: Callable[[str, Callable[[], Any]], Any] = lambda name, make: make(),
) -> Measures:
    """Make some of the `MEASURES` of one model; the plane's second direction is drawn with the next seed.

    The function `attempt` makes each measure by name, and may go on without one that cannot be made.
    """
    s, found = settings, dict[str, Any]()

    def landscape(count: int, points: int) -> Landscape:
        directions = [filter_normalised_direction(objective.parameters, s.seed + i) for i in range(count)]
        return loss_landscape(objective, directions, span=s.span, points=points)

    if "sharpness" in which:
        ascent = partial(epsilon_sharpness, objective, s.epsilon, norm=s.norm, steps=s.steps, seed=s.seed)
        found["sharpness"] = attempt("sharpness", ascent)
    if "hessian" in which:
        lanczos = partial(hessian_eigenvalues, objective, s.eigenvalues, products=s.products, seed=s.seed)
        found["eigenvalues"] = attempt("eigenvalues", lanczos)
        found["trace"] = attempt("trace", partial(hessian_trace, objective, probes=s.probes, seed=s.seed))
    if "line" in which:
        found["line"] = attempt("line", partial(landscape, 1, s.line_points))
    if "plane" in which:
        found["plane"] = attempt("plane", partial(landscape, 2, s.plane_points))
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
