"""Accuracy, error, negative log-likelihood and calibration error, the figures that the AMP paper reports.

`classification_scores` computes them. `ImageClassificationMetric` offers them as an `evaluate.Metric` that needs no
network, and `compute_metrics` as the argument of that name of `transformers.Trainer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from transformers import EvalPrediction


class ImageClassificationMetric(evaluate.Metric):  # type: ignore[misc] # evaluate publishes no types
    """`classification_scores` as an `evaluate.Metric`, to be fed batch by batch.

    `compute` takes `n_bins` beside `predictions` (logits) and `references` (class indices).

    Example:
        >>> metric = ImageClassificationMetric(keep_in_memory=True)
        >>> metric.add_batch(predictions=[[2.0, 0.0], [0.0, 2.0]], references=[0, 0])
        >>> metric.compute()["error"]
        50.0
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017.",
            inputs_description=classification_scores.__doc__,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add the logits (n, K) and class indices (n,) of n samples.

        Raises:
            ValueError: `classification_scores` refuses the batch.
        """
        # evaluate itself would truncate fractional labels and fail obscurely on an empty batch.
        logits, labels = _checked(predictions, references)
        super().add_batch(predictions=logits, references=labels, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Any:
        """Score all samples, those added so far and those passed here; return None on all processes but the first.

        Raises:
            ValueError: there is no sample, or `classification_scores` refuses the samples.
        """
        if predictions is None and references is None and len(self) == 0:
            raise ValueError("there are no samples: call add_batch first, or pass predictions and references")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any, n_bins: int = 15) -> dict[str, float]:
        return classification_scores(predictions, references, n_bins=n_bins)


def compute_metrics(eval_prediction: EvalPrediction, n_bins: int = 15) -> dict[str, float]:
    """Score an evaluation of `transformers.Trainer`: `Trainer(..., compute_metrics=compute_metrics)`.

    Args:
        eval_prediction: logits (n, K) as `predictions` and class indices (n,) as `label_ids`.
        n_bins: number of confidence bins, see `classification_scores`.

    Raises:
        ValueError: the model returned more than logits, or `classification_scores` refuses the arrays.
    """
    if isinstance(eval_prediction.predictions, tuple):
        raise ValueError(
            f"predictions is a tuple of {len(eval_prediction.predictions)} arrays, not the logits alone: "
            "switch the model's other outputs off, or drop them with Trainer's preprocess_logits_for_metrics"
        )
    return classification_scores(eval_prediction.predictions, eval_prediction.label_ids, n_bins=n_bins)


def classification_scores(logits: Any, labels: Any, *, n_bins: int = 15) -> dict[str, float]:
    """Score logits against class indices, in float64.

    Args:
        logits: (n, K) array-like of finite numbers, n >= 1, K >= 2.
        labels: (n,) array-like of integers in [0, K).
        n_bins: number of confidence bins of the calibration error, 15 by default.

    Returns:
        `accuracy` is a fraction (a tie goes to the lowest class), `error` is in percent, and `nll` is the mean
        negative log-likelihood in nats. `ece`, the expected calibration error, is a fraction: |accuracy - mean
        confidence| of each of `n_bins` bins of equal width, (0, 1/n_bins] to (1 - 1/n_bins, 1], averaged with
        the bins' numbers of samples as weights (Guo et al. 2017, section 2, https://arxiv.org/abs/1706.04599).

    Raises:
        ValueError: there are no samples, a shape is another, a logit is not finite, a label is not an integer in
            [0, K), or `n_bins` is below 1.
    """
    bins = calibration_bins(logits, labels, n_bins=n_bins)
    logits, labels = _checked(logits, labels)
    correct = logits.argmax(axis=1) == labels
    return {
        "accuracy": float(correct.mean()),
        "error": float(100 * (~correct).mean()),
        "nll": float(-_log_probabilities(logits)[np.arange(len(labels)), labels].mean()),
        "ece": bins.ece,
    }


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions by their confidence, in n bins of equal width: (0, 1/n] to (1 - 1/n, 1]."""

    counts: npt.NDArray[np.int64]  # number of predictions in each bin
    accuracy: npt.NDArray[np.float64]  # fraction of right predictions in each bin; NaN in an empty bin
    confidence: npt.NDArray[np.float64]  # mean confidence in each bin, a fraction; NaN in an empty bin

    @property
    def ece(self) -> float:
        """Expected calibration error, a fraction: the mean over the predictions of |accuracy - confidence|."""
        gaps = np.abs(self.accuracy - self.confidence)[self.counts > 0]
        return float((gaps * self.counts[self.counts > 0]).sum() / self.counts.sum())


def calibration_bins(logits: Any, labels: Any, *, n_bins: int = 15) -> CalibrationBins:
    """Sort predictions into the bins of the calibration error; arguments and errors are `classification_scores`'s."""
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    logits, labels = _checked(logits, labels)
    confidence = np.exp(_log_probabilities(logits).max(axis=1))
    bins = np.ceil(confidence * n_bins).astype(int) - 1  # a confidence is positive
    counts = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(bins, weights=logits.argmax(axis=1) == labels, minlength=n_bins) / counts
        mean_confidence = np.bincount(bins, weights=confidence, minlength=n_bins) / counts
    return CalibrationBins(counts, accuracy, mean_confidence)


def _log_probabilities(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _checked(logits: Any, labels: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    try:
        logits = np.asarray(logits, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"predictions must be rows of logits, all of one length: {error}") from error
    labels = np.asarray(labels)
    if logits.size == 0 or labels.size == 0:
        raise ValueError(f"there are no samples: predictions {logits.shape}, references {labels.shape}")
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "predictions must be logits of shape (samples, classes), at least two classes, and references "
            f"class indices of shape (samples,); got shapes {logits.shape} and {labels.shape}"
        )
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise ValueError(
            f"predictions hold NaN or infinity in {bad.size} of {len(logits)} samples, the first is sample "
            f"{bad[0]}: the model has diverged, or its numbers overflow"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"references must be integer class indices, got dtype {labels.dtype}")
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        raise ValueError(
            f"references must lie in [0, {logits.shape[1]}), the classes of predictions; sample "
            f"{outside.argmax()} has {labels[outside][0]}"
        )
    return logits, labels.astype(np.int64)
