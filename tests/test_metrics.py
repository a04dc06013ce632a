from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from transformers import EvalPrediction

from amp_plugin.metrics import ImageClassificationMetric, classification_scores, compute_metrics


def random_batch(seed: int, n: int = 211, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Draw over-confident logits that are right about half the time, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = 2.0 * rng.standard_normal((n, classes))
    logits[np.arange(n), labels] += 3.0
    return logits.astype(np.float32), labels


def softmax(row: Any) -> list[float]:
    exps = [math.exp(float(z)) for z in row]
    return [e / sum(exps) for e in exps]


def ece_by_loop(logits: Any, labels: Any, n_bins: int) -> float:
    """Guo et al. 2017, eq. 2 and 3, word for word: B_m holds the confidences in ((m - 1) / M, m / M]."""
    ece = 0.0
    for m in range(1, n_bins + 1):
        bin_confidences, bin_hits = [], []
        for row, label in zip(logits, labels, strict=True):
            probs = softmax(row)
            confidence = max(probs)
            if (m - 1) / n_bins < confidence <= m / n_bins:
                bin_confidences.append(confidence)
                bin_hits.append(probs.index(confidence) == label)
        if bin_hits:
            gap = sum(bin_hits) / len(bin_hits) - sum(bin_confidences) / len(bin_confidences)
            ece += len(bin_hits) / len(labels) * abs(gap)
    return ece


def new_metric() -> ImageClassificationMetric:
    return ImageClassificationMetric(keep_in_memory=True)


@pytest.mark.parametrize("n_bins", [1, 7, 15])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scikit_learn_and_a_plain_loop(seed: int, n_bins: int) -> None:
    logits, labels = random_batch(seed)
    probs = np.array([softmax(row) for row in logits])
    scores = classification_scores(logits, labels, n_bins=n_bins)
    accuracy = accuracy_score(labels, probs.argmax(axis=1))
    assert 0.2 < accuracy < 0.9  # otherwise the cases below would be empty
    assert scores["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert scores["error"] == pytest.approx(100 * (1 - accuracy), abs=1e-10)
    assert scores["nll"] == pytest.approx(log_loss(labels, probs, labels=range(10)), rel=1e-9)
    assert scores["ece"] == pytest.approx(ece_by_loop(logits, labels, n_bins), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_uniform_logits_in_closed_form(classes: int) -> None:
    labels = np.arange(classes)
    scores = classification_scores(np.full((classes, classes), -3.5), labels)
    assert scores["nll"] == pytest.approx(math.log(classes))
    assert scores["accuracy"] == 1 / classes  # a tie goes to class 0
    assert scores["ece"] == pytest.approx(0, abs=1e-12)  # confidence 1 / K, accuracy 1 / K


def test_two_bins_in_closed_form() -> None:
    # Four predictions of confidence 0.75 have two hits, one of confidence 0.9 has one.
    logits = [[math.log(3), 0.0]] * 4 + [[0.0, math.log(9)]]
    scores = classification_scores(logits, [0, 0, 1, 1, 1])
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["error"] == pytest.approx(40.0)
    assert scores["nll"] == pytest.approx(-(2 * math.log(0.75) + 2 * math.log(0.25) + math.log(0.9)) / 5)
    assert scores["ece"] == pytest.approx(0.8 * abs(0.5 - 0.75) + 0.2 * abs(1.0 - 0.9))
    # A single bin lets the two gaps cancel in part.
    assert classification_scores(logits, [0, 0, 1, 1, 1], n_bins=1)["ece"] == pytest.approx(0.78 - 0.6)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    # The gaps at confidence 0.5 and just above have opposite signs; one bin cancels them, two bins do not.
    logits = [[0.0, 0.0], [4e-6, 0.0]]
    assert classification_scores(logits, [0, 1], n_bins=2)["ece"] == pytest.approx(0.5, abs=1e-5)
    assert classification_scores(logits, [0, 1], n_bins=1)["ece"] == pytest.approx(0.0, abs=1e-5)


def test_large_logits_stay_finite() -> None:
    scores = classification_scores([[1e4, 0.0], [-1e4, 0.0]], [0, 0])
    assert scores["nll"] == pytest.approx(5e3)
    assert scores["accuracy"] == 0.5
    assert scores["ece"] == pytest.approx(0.5)


def test_float32_logits_are_scored_in_float64() -> None:
    # In float32, log(1 + exp(-20)) is log(1) = 0.
    assert classification_scores(np.float32([[20.0, 0.0]]), [0])["nll"] == pytest.approx(
        math.log1p(math.exp(-20)), rel=1e-6
    )


@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 2**16))
def test_invariant_to_a_shift_of_the_logits_and_to_the_order_of_the_samples(shift: float, seed: int) -> None:
    logits, labels = random_batch(seed, n=40)
    order = np.random.default_rng(seed).permutation(40)
    expected = classification_scores(logits, labels)
    moved = classification_scores(logits[order].astype(np.float64) + shift, labels[order])
    assert moved == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_metric_gives_the_same_whole_in_batches_or_one_by_one() -> None:
    logits, labels = random_batch(3)
    expected = classification_scores(logits, labels)
    assert new_metric().compute(predictions=logits, references=labels) == pytest.approx(expected, rel=1e-12)

    batched = new_metric()
    for start in range(0, len(labels), 50):
        batched.add_batch(predictions=logits[start : start + 50], references=labels[start : start + 50])
    assert batched.compute() == pytest.approx(expected, rel=1e-12)

    single = new_metric()
    for row, label in zip(logits, labels, strict=True):
        single.add(prediction=row, reference=label)
    assert single.compute(n_bins=15) == pytest.approx(expected, rel=1e-12)


def test_metric_starts_afresh_after_compute(tmp_path: Any) -> None:
    metric = ImageClassificationMetric(cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[1.0, 0.0]], references=[0])["accuracy"] == 1.0
    assert metric.compute(predictions=[[1.0, 0.0]], references=[1])["accuracy"] == 0.0


def test_metric_passes_n_bins_on() -> None:
    logits, labels = random_batch(5)
    by_bins = [new_metric().compute(predictions=logits, references=labels, n_bins=n)["ece"] for n in (2, 15)]
    assert by_bins == pytest.approx([ece_by_loop(logits, labels, n) for n in (2, 15)])
    assert by_bins[0] != by_bins[1]


def test_compute_metrics_scores_an_eval_prediction() -> None:
    logits, labels = random_batch(7)
    prediction = EvalPrediction(predictions=logits, label_ids=labels)
    assert compute_metrics(prediction) == classification_scores(logits, labels)
    assert compute_metrics(prediction, n_bins=4) == classification_scores(logits, labels, n_bins=4)


def test_compute_metrics_refuses_outputs_beside_the_logits() -> None:
    logits, labels = random_batch(7)
    with pytest.raises(ValueError, match=r"tuple of 2 arrays.*preprocess_logits_for_metrics"):
        compute_metrics(EvalPrediction(predictions=(logits, logits), label_ids=labels))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([], [], r"no samples"),
        (np.zeros((0, 10)), np.zeros(0, dtype=int), r"no samples.*\(0, 10\)"),
        ([[0.0, 1.0]] * 3, [0] * 4, r"shapes \(3, 2\) and \(4,\)"),
        ([0.0, 1.0], [0, 1], r"shapes \(2,\) and \(2,\)"),
        ([[0.0], [1.0]], [0, 0], r"at least two classes"),
        ([[0.0, 1.0]] * 2, [[0, 1], [1, 0]], r"shapes \(2, 2\) and \(2, 2\)"),
        ([[0.0, 1.0], [1.0]], [0, 1], r"all of one length"),
        (
            [[0.0, 1.0], [math.nan, 1.0], [1.0, 0.0]],
            [0, 1, 0],
            r"NaN or infinity in 1 of 3 samples.*sample 1",
        ),
        ([[0.0, 1.0], [0.0, math.inf]], [0, 1], r"NaN or infinity in 1 of 2 samples.*sample 1"),
        ([[0.0, 1.0]] * 2, [0.0, 0.5], r"integer class indices.*float64"),
        ([[0.0, 1.0]] * 2, [0, 2], r"\[0, 2\).*sample 1 has 2"),
        ([[0.0, 1.0]] * 2, [-100, 1], r"\[0, 2\).*sample 0 has -100"),
    ],
)
def test_bad_samples_are_refused_by_function_and_metric(logits: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_scores(logits, labels)
    with pytest.raises(ValueError, match=message):
        new_metric().compute(predictions=logits, references=labels)
    with pytest.raises(ValueError, match=message):
        new_metric().add_batch(predictions=logits, references=labels)


def test_batches_of_different_width_are_refused() -> None:
    metric = new_metric()
    metric.add_batch(predictions=[[0.0, 1.0]], references=[0])
    metric.add_batch(predictions=[[0.0, 1.0, 2.0]], references=[0])
    with pytest.raises(ValueError, match="all of one length"):
        metric.compute()


def test_compute_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no samples: call add_batch"):
        new_metric().compute()


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
        classification_scores([[0.0, 1.0]], [0], n_bins=0)
