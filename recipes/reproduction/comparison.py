"""The methods in a ledger: their runs by setting and hyper-parameters, and differences over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, NamedTuple

from reproduction.cells import Cell, Selection, tunable
from reproduction.published import Setting, methods, published
from reproduction.records import Record, comparable, expected, is_trial, same

REFERENCE = "erm"
AMP = "amp"
# What the tables call an option where its last word would not do.
_SYMBOLS = {"amp_inner_lr": "inner_lr", "dropout": "rate", "learning_rate": "lr"}


class Interval(NamedTuple):
    """A mean, and the bounds between which the true mean lies with 95 % confidence, by Student's t over seeds."""

    mean: float
    low: float
    high: float


@dataclass
class Row:
    """The runs of one method with the same hyper-parameters, on the test images."""

    method: str  # name in methods.yaml
    values: dict[str, Any]  # hyper-parameters in which runs of the method may differ, by option
    runs: dict[int, Record] = field(default_factory=dict)  # by seed

    def measured(self, name: str) -> dict[int, float]:
        """Return one metric by seed."""
        return {seed: run["metrics"][name] for seed, run in self.runs.items() if name in run["metrics"]}

    def numbers(self, name: str) -> list[float]:
        """Return one metric of every run."""
        return list(self.measured(name).values())

    def mean(self, name: str) -> float:
        """Return the mean of one metric over the runs; NaN if no run has it."""
        return mean(self.numbers(name) or [math.nan])

    def label(self) -> str:
        """Name the method and its hyper-parameters."""
        said = in_words(self.values)
        return f"{methods()[self.method].label}{f' ({said})' if said else ''}"


def in_words(values: Mapping[str, Any]) -> str:
    """Name hyper-parameters, for the reader."""
    return ", ".join(
        f"{_SYMBOLS.get(name, name.split('_')[-1])} {value:.3g}"
        if isinstance(value, float | int)
        else f"{name} {value}"
        for name, value in values.items()
    )


def interval(numbers: Sequence[float]) -> Interval | None:
    """Return the interval of the mean of at least two finite numbers; None for fewer, or where one is not finite."""
    from scipy import stats  # the extra "plots" has it; a sweep without tables does not need it

    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    half = stats.t.ppf(0.975, len(numbers) - 1) * stdev(numbers) / len(numbers) ** 0.5
    return Interval(mean(numbers), mean(numbers) - half, mean(numbers) + half)


def paired(reference: Row | None, row: Row, name: str) -> Interval | None:
    """Return the reference's metric minus the row's, over the seeds that both have; None for fewer than two seeds."""
    if reference is None or reference is row:
        return None
    theirs, ours = reference.measured(name), row.measured(name)
    return interval([theirs[seed] - ours[seed] for seed in theirs.keys() & ours.keys()])


def reference_of(rows: Sequence[Row], method: str = REFERENCE) -> Row | None:
    """Return what others are compared with: a method with the hyper-parameters that have most seeds; default: ERM."""
    return max((row for row in rows if row.method == method), key=lambda row: len(row.runs), default=None)


def rows_of(chosen: Selection, ledger: Sequence[Record]) -> dict[Setting, list[Row]]:
    """Return the rows of ERM and the chosen methods that have runs, by setting, in the order of methods.yaml."""
    found: dict[Setting, list[Row]] = {}
    runs = [
        (run["settings"]["seed"], comparable(run["settings"]), run)
        for run in ledger
        if not is_trial(run) and (chosen.seeds is None or run["settings"]["seed"] in chosen.seeds)
    ]
    for setting in chosen.settings():
        model = published().models[setting.model]
        kinds = []
        for method in methods():
            names = {n: f"model_kwargs.{model.dropout}" if n == "dropout" else n for n in tunable(chosen.scale, method)}
            kinds.append((method, expected(Cell(setting, method, 0), chosen.scale), names))
        rows: dict[tuple[str, ...], Row] = {}
        for seed, ours, run in runs:
            if (ours.get("dataset"), ours.get("model")) != (setting.dataset, model.architecture):
                continue
            # ERM comes first: the others that train with SGD differ from it by an option that is off in ERM's runs.
            fits = ((m, names) for m, settings, names in kinds if same(ours, settings, {"seed", *names.values()}))
            method, names = next(fits, ("", {}))
            if not method or (chosen.methods is not None and method not in (REFERENCE, *chosen.methods)):
                continue
            values = {name: ours[key] for name, key in names.items() if key in ours}
            row = rows.setdefault((method, *map(str, values.values())), Row(method, values))
            if seed in row.runs:
                raise ValueError(f"the ledger has {row.label()} on {setting.dataset}, seed {seed}, twice; keep one")
            row.runs[seed] = run
        if rows:
            order = list(methods())
            found[setting] = [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1:]))]
    return found
