"""The course of a training as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from amp_plugin.report.style import BLUE, GREEN, VERMILION, legend_below, picture
from amp_plugin.text import for_matplotlib

Records = Sequence[Mapping[str, Any]]

_MARKED = 20  # the longest line whose points have markers


class _Line(NamedTuple):
    panel: str  # its unit is the panel's
    key: str
    label: str
    colour: str
    style: str
    marker: str


# The same quantity looks the same in every panel: at the weights, at the worst point near them, on the test images.
_LINES = (
    _Line("loss (nats)", "loss", "train, at the weights", BLUE, "-", "o"),
    _Line("loss (nats)", "amp_loss", "train, worst in the ball", VERMILION, "--", "s"),
    _Line("loss (nats)", "eval_loss", "test", GREEN, "-.", "^"),
    _Line("error (%)", "eval_error", "test", GREEN, "-.", "^"),
    _Line("sharpness (nats)", "sharpness", "train, worst in the ball", VERMILION, "--", "s"),
    _Line("tensors clipped to the ball (%)", "clipped", "train, worst in the ball", VERMILION, "--", "s"),
    _Line("gradient norm", "grad_norm", "train, at the weights", BLUE, "-", "o"),
    _Line("learning rate", "learning_rate", "train, at the weights", BLUE, "-", "o"),
)


def series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and values of one quantity in records such as ``trainer.state.log_history``."""
    points = [(float(r["epoch"]), float(r[key])) for r in records if key in r and "epoch" in r]
    return [epoch for epoch, _ in points], [value for _, value in points]


def plot_curves(records: Records, path: Path, title: str, *, where: str = "test") -> None:
    """Draw what was logged against the epoch to a PNG, a panel for each kind of quantity that was logged.

    Args:
        records: what a finished run logged, its ``trainer.state.log_history``.
        path: PNG to write.
        title: text above the picture.
        where: name in the legend of what the evaluations were made on, default "test".

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
        ValueError: nothing was logged that a panel could show.
    """
    data = {line: series(records, line.key) for line in _LINES}
    data = {line: points for line, points in data.items() if any(map(math.isfinite, points[1]))}
    panels = list(dict.fromkeys(line.panel for line in data))
    if not panels:
        raise ValueError(f"the records hold none of {', '.join(line.key for line in _LINES)}")
    columns = min(len(panels), 3 if len(panels) != 4 else 2)
    rows = math.ceil(len(panels) / columns)
    with picture(path, title, (3.9 * columns, 0.6 + 2.9 * rows)) as figure:
        axes = dict(zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False))
        for empty in figure.axes[len(panels) :]:
            empty.remove()
        end = max(epochs[-1] for epochs, _ in data.values())
        for line, (epochs, values) in data.items():
            scale = 100 if line.key == "clipped" else 1
            axes[line.panel].plot(
                epochs,
                [scale * value for value in values],
                linestyle=line.style,
                color=line.colour,
                label=for_matplotlib(where) if line.colour == GREEN else line.label,
                linewidth=1.6,
                marker=line.marker if len(epochs) <= _MARKED else "",
                markersize=4,
                clip_on=False,  # a marker on the axis is seen whole
            )
        for name, panel in axes.items():
            panel.set(xlabel="epoch", ylabel=name, xlim=(0, 1.03 * end))
            values = [v for line in panel.lines for v in line.get_ydata() if math.isfinite(v)]
            if name == "learning rate" and max(values) >= 10 * min(values) > 0:
                panel.set_yscale("log")
            elif min(values) >= 0:
                panel.set_ylim(0, 1.05 * max(values) or 1)
        legend_below(figure, 3)
