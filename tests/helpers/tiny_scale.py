"""A scale for the tests of recipes/reproduce.py, small enough to be run, and runs of it as a ledger has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from reproduction import records
from reproduction.cells import Cell
from reproduction.published import Setting
from reproduction.scale import Scale, read_scale

from amp_plugin.train.options import parse
from amp_plugin.train.settings import settings_of

SAMPLE = Setting("preactresnet18", "none", "cifar10_sample")
LAUNCH = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
TINY: dict[str, Any] = {
    "models": {"preactresnet18": {"width": 4, "layers": [1, 1, 1, 1]}},
    "datasets": ["cifar10_sample"],
    "augmentations": ["none"],
    "methods": ["erm", "amp", "dropout"],
    "seeds": [1, 2],
    "options": {
        "train_images": 60,
        "per_device_train_batch_size": 20,
        "num_train_epochs": 2,
        "use_cpu": True,
        "cpu_threads": 1,
        "save_strategy": "epoch",
    },
    "launch": LAUNCH.split(" "),
    "tuning": {
        "validation_images": 100,
        "seed": 0,
        "trials": {
            "erm": [{"learning_rate": 0.1}, {"weight_decay": 0.0005}],
            "amp": [{"amp_epsilon": 0.2, "amp_inner_lr": 0.3}, {"amp_epsilon": 0.1, "amp_inner_lr": 1.0}],
            "dropout": [{"dropout": 0.1}, {"dropout": 0.2}],
        },
    },
}


def written(folder: Path, **changes: Any) -> Scale:
    """The tiny scale in a file, with some things changed; None leaves one out."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**TINY, **changes}.items() if v is not None}))
    return read_scale(str(path))


def chosen(scale: Scale, **values: dict[str, Any]) -> Scale:
    return replace(scale, chosen={SAMPLE: values})


def run_of(cell: Cell, scale: Scale, **metrics: float) -> dict[str, Any]:
    """What train.py would append to the ledger for a cell."""
    settings = settings_of(*parse(records.train_argv(cell, scale)))
    return json.loads(json.dumps({"commit": "abc", "settings": settings, "metrics": {"eval_error": 50.0, **metrics}}))
