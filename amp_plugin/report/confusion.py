"""Which classes are taken for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amp_plugin.report.style import BLUE, picture
from amp_plugin.text import for_matplotlib

_WRITTEN = 15  # classes up to which every cell has its number and every class its name
_NAMES = 25  # the largest number of names along an axis
_LISTED = 15  # number of confusions that are listed where cells have no numbers


def plot_confusion(logits: Any, labels: Any, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draw the confusion matrix to a PNG: the share of every true class that is predicted as each class.

    With many classes the cells have no numbers and only some rows a name; the most frequent confusions are then listed
    beside the matrix.

    Args:
        logits: (n, K) scores; the highest is the prediction.
        labels: (n,) class indices in [0, K).
        class_names: names of the K classes.
        path: PNG to write.
        title: text above the picture.

    Raises:
        ImportError: matplotlib or scikit-learn is missing (``pip install "amp-plugin[plots]"``).
        ValueError: the number of names is not that of the classes.
    """
    from matplotlib.colors import PowerNorm
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    logits, labels = np.asarray(logits), np.asarray(labels)
    classes = logits.shape[1]
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for logits of {classes} classes")
    matrix = 100 * confusion_matrix(labels, logits.argmax(axis=1), labels=range(classes), normalize="true")
    written = classes <= _WRITTEN
    side = min(3.5 + 0.55 * classes, 9.0)
    with picture(path, title, ((1.1 if written else 1.7) * side, side)) as figure:
        axes = figure.add_subplot() if written else figure.subplots(1, 2, width_ratios=(3, 1))[0]
        axes.grid(False)
        axes.spines[:].set_visible(True)
        # The diagonal would drown out the confusions on a linear scale.
        norm = PowerNorm(0.5, 0, 100)
        display = ConfusionMatrixDisplay(matrix, display_labels=[_short(name) for name in class_names])
        display.plot(
            ax=axes, include_values=written, values_format=".0f", cmap="Blues", colorbar=False, im_kw={"norm": norm}
        )
        bar = figure.colorbar(display.im_, ax=axes, shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
        bar.set_label("share of the true class (%)")
        shown = range(0, classes, -(-classes // _NAMES))
        names = [_short(class_names[i]) for i in shown]
        axes.set_xticks(shown, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(shown, names)
        axes.set(xlabel="predicted class", ylabel="true class")
        if not written:
            _list_confusions(figure.axes[1], matrix, class_names)


def _list_confusions(axes: Any, matrix: Any, class_names: Sequence[str]) -> None:
    """Draw the cells beside the diagonal with the largest shares, as bars."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = [i for i in np.argsort(wrong, axis=None)[::-1][:_LISTED] if wrong.flat[i] > 0]
    pairs = [(i // len(matrix), i % len(matrix)) for i in order]
    labels = [f"{_short(class_names[true])} → {_short(class_names[predicted])}" for true, predicted in pairs]
    bars = axes.barh(range(len(pairs)), [wrong[pair] for pair in pairs], color=BLUE)
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.margins(x=0.15)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(pairs)), labels)
    axes.set(xlabel="share of the true class (%)", title="most frequent confusions")
    axes.invert_yaxis()


def _short(name: str) -> str:
    return for_matplotlib(name, 18)
