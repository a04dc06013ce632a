"""What a run has to show: its training curves as a picture, its figures as a small table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which the colour-blind tell apart; they stand on white and on black.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


def table(rows: Mapping[str, str]) -> str:
    """Two aligned columns, names and values, between rules."""
    left = max(len(name) for name in rows)
    right = max(len(value) for value in rows.values())
    rule = "-" * (left + right + 2)
    return "\n".join([rule, *(f"{name:<{left}}  {value:>{right}}" for name, value in rows.items()), rule])


def series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one logged quantity, e.g. of ``trainer.state.log_history``."""
    points = [(float(r["epoch"]), float(r[key])) for r in records if key in r and "epoch" in r]
    return [epoch for epoch, _ in points], [value for _, value in points]


def append_to_ledger(path: Path, record: Mapping[str, Any]) -> None:
    """Append one finished run (`amp_plugin.provenance.run_record`) to a JSON Lines file, in one write.

    Args:
        path: the ledger; made if it does not exist.
        record: what `run_record` returns; what JSON cannot hold becomes text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as ledger:
        ledger.write(json.dumps(record, default=str) + "\n")


def plot_curves(records: Records, path: Path, title: str) -> None:
    """Draw loss, test error and learning rate against the epoch to a PNG.

    Args:
        records: ``trainer.state.log_history`` of a finished run.
        path: the PNG to write.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    lines: list[tuple[Any, str, str, str, str]] = [
        (loss, "loss", "train, at the weights", _BLUE, "-"),
        (loss, "amp_loss", "train, worst in the ball", _ORANGE, "--"),
        (loss, "eval_loss", "test", _GREEN, "-."),
        (error, "eval_error", "", _GREEN, "-."),
        (rate, "learning_rate", "", _BLUE, "-"),
    ]
    for axes, key, label, colour, style in lines:
        epochs, values = series(records, key)
        if values:
            axes.plot(epochs, values, style, color=colour, label=label or None, linewidth=1.6)
    for axes, name in ((loss, "loss (nats)"), (error, "error (%)"), (rate, "learning rate")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
    rate.set_yscale("log")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
