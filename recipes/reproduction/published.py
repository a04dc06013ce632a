"""What the paper publishes: its settings and its test errors, from published.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent


class Setting(NamedTuple):
    """What a table of the paper is about: everything but the method and the seed."""

    model: str
    augment: str
    dataset: str


@dataclass(frozen=True)
class Model:
    """A network of the paper.

    Attributes:
        architecture: timm's name of it.
        dropout: the argument of it that the baseline "dropout" sets.
    """

    architecture: str
    dropout: str


@dataclass(frozen=True)
class Figure:
    """A published test error, in per cent.

    Attributes:
        mean: over seeds.
        std: over seeds.
        nll: mean; None where the paper gives none.
    """

    mean: float
    std: float
    nll: float | None = None


@dataclass(frozen=True)
class Published:
    """published.yaml.

    Attributes:
        models: by the paper's names.
        images: to train on, by data set.
        classes: by data set.
        perturbation: AMP's epsilon and inner_lr, as options of train.py, by model and augmentation.
        results: by setting and method.
    """

    models: dict[str, Model]
    images: dict[str, int]
    classes: dict[str, int]
    perturbation: dict[tuple[str, str], dict[str, float]]
    results: dict[Setting, dict[str, Figure]]


@cache
def published() -> Published:
    """Read it, once."""
    data: dict[str, Any] = yaml.safe_load((HERE / "published.yaml").read_text())
    return Published(
        models={name: Model(**fields) for name, fields in data["models"].items()},
        images={name: fields["images"] for name, fields in data["datasets"].items()},
        classes={name: fields["classes"] for name, fields in data["datasets"].items()},
        perturbation={
            (model, augment): dict(zip(("amp_epsilon", "amp_inner_lr"), pair, strict=True))
            for model, pairs in data["perturbation"].items()
            for augment, pair in pairs.items()
        },
        results={
            Setting(model, augment, dataset): {method: Figure(*figure) for method, figure in figures.items()}
            for model, by_augment in data["results"].items()
            for augment, by_dataset in by_augment.items()
            for dataset, figures in by_dataset.items()
        },
    )
