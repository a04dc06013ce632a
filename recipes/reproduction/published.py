"""The paper's settings and test errors, from published.yaml, and the methods that it compares, from methods.yaml."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

T = TypeVar("T")

HERE = Path(__file__).resolve().parent


class Setting(NamedTuple):
    """What a table of the paper is about: everything but the method and the seed."""

    model: str
    augment: str
    dataset: str


class Model(NamedTuple):
    """A network of the paper: timm's name of it, and the argument of it that the baseline "dropout" sets."""

    architecture: str
    dropout: str


class Figure(NamedTuple):
    """A published test error in per cent: mean and standard deviation over seeds, and the mean NLL if given."""

    mean: float
    std: float
    nll: float | None = None


class Published(NamedTuple):
    """What published.yaml says."""

    models: dict[str, Model]  # by the paper's names
    datasets: dict[str, dict[str, int]]  # number of training images and of classes, by data set
    perturbation: dict[str, dict[str, dict[str, float]]]  # AMP's options of train.py, by model and augmentation
    results: dict[Setting, dict[str, Figure]]  # test errors by setting and method


class Method(NamedTuple):
    """A way to train."""

    label: str  # name in the tables
    options: dict[str, Any]  # of train.py, or "dropout" or "epochs_times" (see methods.yaml)
    sources: tuple[str, ...]  # methods whose chosen values this one takes: itself, or what "tuned_as" names

    @property
    def ascent(self) -> str | None:
        """AMP's ascent policy; None where the method is not AMP."""
        return str(self.options.get("amp_ascent", "full")) if self.options["optim"] == "amp" else None


@cache
def published() -> Published:
    """Read published.yaml."""
    data: dict[str, Any] = yaml.safe_load((HERE / "published.yaml").read_text(encoding="utf-8"))
    models = {name: Model(**fields) for name, fields in data.pop("models").items()}
    results = by_setting(data.pop("results"), lambda figure: Figure(*figure))
    return Published(models=models, results=results, **data)


@cache
def methods() -> dict[str, Method]:
    """Read the methods by name, in the order in which a sweep runs them."""
    data = yaml.safe_load((HERE / "methods.yaml").read_text(encoding="utf-8"))
    return {
        name: Method(fields["label"], fields["options"], _names(fields.get("tuned_as", name)))
        for name, fields in data.items()
    }


def _names(given: str | list[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def by_setting(data: dict[str, Any], convert: Callable[[Any], T]) -> dict[Setting, dict[str, T]]:
    """Turn mappings by model, augmentation, data set and method into mappings by setting and method."""
    return {
        Setting(model, augment, dataset): {method: convert(value) for method, value in values.items()}
        for model, by_augment in data.items()
        for augment, by_dataset in by_augment.items()
        for dataset, values in by_dataset.items()
    }
