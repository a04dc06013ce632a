"""The scale of a sweep: how large the networks are and how long they train, from a YAML file such as cpu.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from reproduction.published import HERE, Setting, by_setting, methods, published

PAPER = "paper"  # the scale at which the published figures are comparable


@dataclass(frozen=True)
class Tuning:
    """How hyper-parameters are chosen."""

    validation_images: int  # number of training images that are held out, and decide
    seed: int  # seed of the trials
    trials: dict[str, list[dict[str, Any]]]  # values to try, by method; as many for each
    carried: dict[str, str] = field(default_factory=dict)  # by data set without trials, the one whose values it takes


@dataclass(frozen=True)
class Scale:
    """What all cells of a sweep have in common."""

    path: Path  # the YAML file, whose name without its ending is that of the scale
    models: dict[str, dict[str, Any]]  # arguments of each network, by the paper's names of them
    datasets: list[str]  # data sets to train on
    augmentations: list[str]  # as train.py calls them
    seeds: list[int]  # seeds of the runs that are reported
    options: dict[str, Any]  # options of train.py
    launch: list[str]  # arguments of ``accelerate launch``
    methods: list[str] | None = None  # methods to compare; None for those that are published for a cell
    tuning: Tuning | None = None  # None if the published hyper-parameters are taken
    chosen: dict[Setting, dict[str, dict[str, Any]]] = field(default_factory=dict)  # from `chosen_path`, by method
    train_args: list[str] = field(default_factory=list)  # further arguments of train.py, from the command line

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return self.path.stem

    @property
    def chosen_path(self) -> Path:
        """The file with the chosen hyper-parameters, beside the scale's."""
        return self.path.with_name(f"{self.name}_chosen.yaml")


def read_scale(name: str) -> Scale:
    """Read a scale that comes with the recipes, or a YAML file, and what was chosen for it."""
    path = HERE / f"{name}.yaml" if (HERE / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"--scale {name!r} is neither paper nor cpu nor a YAML file")
    data = yaml.safe_load(path.read_text())
    known = {f.name for f in fields(Scale)} - {"path", "chosen", "train_args"}
    needed = known - {"methods", "tuning"}
    if not isinstance(data, dict) or not needed <= data.keys() <= known:
        raise ValueError(f"{path}: a scale names {', '.join(sorted(needed))}, and methods and tuning if it likes")
    tuning = data.pop("tuning", None)
    scale = Scale(path=path, tuning=None if tuning is None else Tuning(**tuning), **data)
    _check(scale)
    if scale.chosen_path.is_file():
        scale.chosen.update(by_setting(yaml.safe_load(scale.chosen_path.read_text()), itemgetter("values")))
    return scale


def _check(scale: Scale) -> None:
    """Raise a ValueError where something in a scale cannot be meant."""
    trials = scale.tuning.trials if scale.tuning else {}
    for kind, named, known in (
        ("model", scale.models, published().models),
        ("method", [*(scale.methods or ()), *trials], methods()),
    ):
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"{scale.path}: unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    if scale.tuning:
        counts = {name: len(some) for name, some in trials.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{scale.path}: every method needs the same number of trials, got {counts}")
        if strange := scale.tuning.carried.items() - set(product(scale.datasets, scale.datasets)):
            raise ValueError(
                f"{scale.path}: carried names data sets of the scale, {', '.join(scale.datasets)}; got {dict(strange)}"
            )
        if scale.tuning.seed in scale.seeds:
            raise ValueError(f"{scale.path}: the seed of the trials, {scale.tuning.seed}, is among those reported")
