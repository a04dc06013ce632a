"""What the published cells take, computed and not run: passes, FLOPs and hours on a GPU of a named speed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from guides.page import table as markdown_table
from torch import nn

from amp_plugin.models.classifier import image_classifier
from amp_plugin.text import in_markdown
from amp_plugin.train.costs import costs, counts
from amp_plugin.train.options import RecipeArguments, parse
from amp_plugin.train.trainer import RecipeTrainer
from reproduction.cells import Cell
from reproduction.published import published
from reproduction.records import train_argv
from reproduction.scale import Scale

_HEADS = ("model", "augmentation", "data set", "method", "seeds", "passes a run", "FLOPs a run", "GPU hours a run")


class Gpu(NamedTuple):
    """A GPU and its arithmetic, its published FLOPs a second, and the share of them that is assumed to be reached."""

    name: str = "NVIDIA A100, TF32"
    peak: float = 156e12
    utilisation: float = 0.1

    def hours(self, flops: float) -> float:
        """Return the hours that so many FLOPs take."""
        return flops / (self.peak * self.utilisation) / 3600


class Price(NamedTuple):
    """What one run takes: passes over all training images, and FLOPs without tests; a multiply-add counts as two."""

    cell: Cell
    passes: float
    flops: float


def price(cell: Cell, scale: Scale) -> Price:
    """Count what a run takes, on tensors without contents."""
    data_args, model_args, args = parse(train_argv(cell, scale))
    dataset = published().datasets.get(cell.setting.dataset)
    if dataset is None:
        raise ValueError(
            f"--plan knows the paper's data sets, {', '.join(published().datasets)}; not {cell.setting.dataset}"
        )
    images = data_args.train_images or dataset["images"]
    architecture = (model_args.model, str(model_args.model_kwargs), dataset["classes"])
    model = _model(*architecture)
    kind, kwargs = RecipeTrainer.get_optimizer_cls_and_kwargs(args, model)
    count = counts(args, images, kind(model.parameters(), **kwargs), args.passes_per_loss)
    return Price(cell, count.images / images, count.images * _flops(*architecture))


def table(prices: Sequence[Price], gpu: Gpu) -> str:
    """Render the prices in Markdown, one row for the seeds of a cell, with the sum of all."""
    seeds = Counter((*cell.setting, cell.method, passes, flops) for cell, passes, flops in prices)
    rows = [
        [*map(in_markdown, names), str(n), f"{passes:g}", f"{flops:.2e}", f"{gpu.hours(flops):.1f}"]
        for (*names, passes, flops), n in seeds.items()
    ]
    total = sum(one.flops for one in prices)
    return (
        f"Computed, not run: counted FLOPs at an assumed {gpu.utilisation:.0%} of the {gpu.peak / 1e12:g} TFLOP/s of"
        f" one {in_markdown(gpu.name)}; tests and loading are not counted.\n\n{markdown_table(_HEADS, rows)}\n\n"
        f"All {len(prices)} runs: {total:.2e} FLOPs, {gpu.hours(total):,.0f} GPU hours."
    )


@cache
def _model(architecture: str, kwargs: str, classes: int) -> nn.Module:
    names = [str(i) for i in range(classes)]
    return image_classifier(architecture, names, mean=[0.5] * 3, std=[0.5] * 3, **json.loads(kwargs))


@cache
def _flops(architecture: str, kwargs: str, classes: int) -> int:
    """Count the FLOPs of one image's forward and backward pass."""
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    args = RecipeArguments(use_cpu=True, output_dir="unused")
    return costs(_model(architecture, kwargs, classes), partial(torch.optim.SGD, lr=0.1), args, batch).training_flops
