"""Whether a classifier is as often right as it is confident, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from amp_plugin.metrics import calibration_bins
from amp_plugin.report.style import SKY, VERMILION, legend_below, picture


def plot_reliability(logits: Any, labels: Any, path: Path, title: str, *, n_bins: int = 15) -> None:
    """Draw the reliability diagram (Guo et al. 2017, https://arxiv.org/abs/1706.04599) to a PNG.

    The upper panel shows the accuracy of each bin of confidence and its gap to the mean confidence there; the lower
    panel shows how many predictions the bins hold. The expected calibration error is the mean gap over the predictions.

    Args:
        logits: (n, K) scores, as `amp_plugin.metrics.classification_scores` takes them.
        labels: (n,) class indices in [0, K).
        path: PNG to write.
        title: text above the picture; the calibration error is added to it.
        n_bins: number of bins, of equal width, default 15.

    Raises:
        ImportError: matplotlib is missing (``pip install "amp-plugin[plots]"``).
        ValueError: `classification_scores` refuses the arrays.
    """
    bins = calibration_bins(logits, labels, n_bins=n_bins)
    with picture(path, f"{title}\nexpected calibration error {100 * bins.ece:.2f} %", (6.4, 6.6)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        width = 100 / n_bins
        middles = width * (np.arange(n_bins) + 0.5)
        filled = bins.counts > 0
        accuracy, confidence = 100 * bins.accuracy[filled], 100 * bins.confidence[filled]
        above.bar(middles[filled], accuracy, width, color=SKY, edgecolor="white", label="accuracy")
        above.bar(
            middles[filled],
            abs(accuracy - confidence),
            width,
            np.minimum(accuracy, confidence),
            color="none",
            edgecolor=VERMILION,
            hatch="////",
            label="gap to the mean confidence",
        )
        above.plot([0, 100], [0, 100], "--", color="black", linewidth=1.2, label="accuracy = confidence")
        above.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
        counts = below.bar(middles, bins.counts, width, color=SKY, edgecolor="white")
        texts = [f"{count:,}" if count else "" for count in bins.counts]
        below.bar_label(counts, texts, padding=2, fontsize=7)
        below.set(xlabel="confidence (%)", ylabel="predictions")
        below.margins(y=0.2)
        legend_below(figure)
