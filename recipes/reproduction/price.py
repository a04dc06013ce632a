"""What the published cells take, computed and not run: passes, FLOPs and hours on a GPU of a named speed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amp_plugin.models.classifier import image_classifier
from amp_plugin.train.costs import costs, counts
from amp_plugin.train.options import RecipeArguments, parse
from amp_plugin.train.trainer import RecipeTrainer
from reproduction.cells import Cell
from reproduction.published import published
from reproduction.records import train_argv
from reproduction.scale import Scale


@dataclass(frozen=True)
class Gpu:
    """What a GPU computes in a second.

    Attributes:
        name: of it.
        peak: its published FLOPs a second in the arithmetic that is meant.
        utilisation: the share of them that is assumed to be reached.
    """

    name: str = "NVIDIA A100, TF32"
    peak: float = 156e12
    utilisation: float = 0.1

    def hours(self, flops: float) -> float:
        """That so many FLOPs take."""
        return flops / (self.peak * self.utilisation) / 3600


@dataclass(frozen=True)
class Price:
    """What one run takes.

    Attributes:
        cell: the run.
        passes: forward and backward passes over all training images.
        flops: of the whole training; a multiply-add counts as two. Tests are not counted.
    """

    cell: Cell
    passes: float
    flops: float


def price(cell: Cell, scale: Scale) -> Price:
    """Count what a run takes, on tensors without contents.

    Raises:
        ValueError: the options cannot be meant.
    """
    _, model_args, args = parse(train_argv(cell, scale))
    images = published().images[cell.setting.dataset]
    options = cell.options(scale)
    if "train_images" in options:
        images = options["train_images"]
    architecture = (model_args.model, str(model_args.model_kwargs), published().classes[cell.setting.dataset])
    model = _model(*architecture)
    kind, kwargs = RecipeTrainer.get_optimizer_cls_and_kwargs(args, model)
    count = counts(args, images, kind(model.parameters(), **kwargs), args.passes_per_loss)
    return Price(cell, count.images / images, count.images * _flops(*architecture))


def table(prices: Iterable[Price], gpu: Gpu) -> str:
    """In Markdown, one row for the seeds of a cell, with the sum of all."""
    lines = [
        f"Computed, not run: counted FLOPs at an assumed {gpu.utilisation:.0%} of the {gpu.peak / 1e12:g} TFLOP/s of"
        f" one {gpu.name}; tests and loading are not counted.",
        "",
        "| model | augmentation | data set | method | seeds | passes a run | FLOPs a run | GPU hours a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    grouped: dict[Any, list[Price]] = {}
    for one in prices:
        grouped.setdefault((one.cell.setting, one.cell.method), []).append(one)
    for (setting, method), group in grouped.items():
        first = group[0]
        lines.append(
            f"| {setting.model} | {setting.augment} | {setting.dataset} | {method} | {len(group)} | {first.passes:g} |"
            f" {first.flops:.2e} | {gpu.hours(first.flops):.1f} |"
        )
    total = sum(one.flops for group in grouped.values() for one in group)
    runs = sum(map(len, grouped.values()))
    return "\n".join([*lines, "", f"All {runs} runs: {total:.2e} FLOPs, {gpu.hours(total):,.0f} GPU hours."])


@cache
def _model(architecture: str, kwargs: str, classes: int) -> nn.Module:
    names = [str(i) for i in range(classes)]
    return image_classifier(architecture, names, mean=[0.5] * 3, std=[0.5] * 3, **json.loads(kwargs))


@cache
def _flops(architecture: str, kwargs: str, classes: int) -> int:
    """Of one image's forward and backward pass."""
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    args = RecipeArguments(use_cpu=True, output_dir=str(Path("unused")))
    return costs(_model(architecture, kwargs, classes), partial(torch.optim.SGD, lr=0.1), args, batch).training_flops
