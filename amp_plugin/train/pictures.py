"""The pictures that a run leaves in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PredictionOutput

from amp_plugin.report import plot_confusion, plot_curves, plot_reliability


def draw_pictures(
    folder: Path, title: str, records: list[dict[str, Any]], tested: PredictionOutput, names: list[str], where: str
) -> None:
    """Draw the training's curves, and the confusion matrix and reliability diagram of its test; print where they are.

    Args:
        folder: of the run.
        title: of the run.
        records: ``trainer.state.log_history``.
        tested: logits and class indices of the test.
        names: of the classes.
        where: what the test was made on, "test" or "validation".
    """
    curves, confusion, reliability = (folder / f"{n}.png" for n in ("curves", "confusion", "reliability"))
    logits, labels = tested.predictions, tested.label_ids
    subject = f"{title}: {len(logits):,} {where} images"
    try:
        plot_curves(records, curves, title, where=where)
        plot_confusion(logits, labels, names, confusion, subject)
        plot_reliability(logits, labels, reliability, subject)
    except ImportError as error:
        print(f'pictures left out: {error.name} is missing (pip install "amp-plugin[plots]")')
    else:
        print(f"curves: {curves}\nconfusion matrix: {confusion}\nreliability diagram: {reliability}")
