"""Test a finished model on corrupted images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean

from amp_plugin.data import ImageBatches
from amp_plugin.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from amp_plugin.train.trainer import RecipeTrainer

MEASURES = ("error", "nll", "ece")
TESTS = len(CORRUPTIONS) * len(SEVERITIES)


def corrupted_test(trainer: RecipeTrainer, images: ImageBatches) -> dict[str, float]:
    """Return the measures under each corruption, as means over the severities, and the means over all corruptions.

    Their names are ``corrupted_CORRUPTION_MEASURE`` and ``corrupted_MEASURE``.
    """
    clean, found = images.split, dict[str, float]()
    try:
        for corruption in CORRUPTIONS:
            tests = []
            for severity in SEVERITIES:
                # accelerate keeps every data set that it is given, so that all tests are made with the same one.
                images.split = replace(clean, images=corrupt(clean.images, corruption, severity))
                tests.append(trainer.predict(images, metric_key_prefix="eval").metrics or {})
            for name in MEASURES:
                found[f"corrupted_{corruption}_{name}"] = mean(test[f"eval_{name}"] for test in tests)
    finally:
        images.split = clean
    for name in MEASURES:
        found[f"corrupted_{name}"] = mean(found[f"corrupted_{corruption}_{name}"] for corruption in CORRUPTIONS)
    return found


def corrupted_metrics(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return what `corrupted_test` has put among a run's metrics: measures by the name of the corruption, or "mean"."""
    names = {f"{corruption}_": kind.name for corruption, kind in CORRUPTIONS.items()} | {"": "mean"}
    found = {
        name: {n: metrics[key] for n in MEASURES if (key := f"corrupted_{corruption}{n}") in metrics}
        for corruption, name in names.items()
    }
    return {name: measures for name, measures in found.items() if measures}
