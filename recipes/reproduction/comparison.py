"""The methods in a ledger: their runs by setting and hyper-parameters, and differences over paired seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, NamedTuple

from reproduction.cells import Cell, Selection, tunable
from reproduction.methods import methods
from reproduction.published import Setting, published
from reproduction.records import Record, comparable, expected, is_trial, same
from reproduction.scale import Scale

REFERENCE = "erm"
AMP = "amp"
_LEVEL = 0.95
_SYMBOLS = {
    "adversarial_epsilon": "epsilon",
    "amp_epsilon": "epsilon",
    "amp_inner_lr": "inner_lr",
    "dropout": "rate",
    "flood_level": "level",
    "label_smoothing_factor": "factor",
    "learning_rate": "lr",
    "mixup_alpha": "alpha",
    "rmp_epsilon": "epsilon",
    "sam_rho": "rho",
    "weight_decay": "decay",
}


class Interval(NamedTuple):
    """A mean and where the true one lies with 95 % confidence, by Student's t over seeds."""

    mean: float
    low: float
    high: float


@dataclass
class Row:
    """The runs of one method with the same hyper-parameters, on the test images.

    Attributes:
        method: its name in methods.yaml.
        values: of the hyper-parameters in which runs of the method may differ, by option.
        runs: by seed.
    """

    method: str
    values: dict[str, Any]
    runs: dict[int, Record] = field(default_factory=dict)

    def measured(self, name: str) -> dict[int, float]:
        """One metric by seed."""
        return {seed: run["metrics"][name] for seed, run in self.runs.items() if name in run["metrics"]}

    def label(self) -> str:
        """Name and hyper-parameters."""
        said = in_words(self.values)
        return f"{methods()[self.method].label}{f' ({said})' if said else ''}"


def in_words(values: Mapping[str, Any]) -> str:
    """Hyper-parameters, for the reader."""
    return ", ".join(f"{_SYMBOLS.get(name, name)} {value:.3g}" for name, value in values.items())


def interval(numbers: Sequence[float]) -> Interval | None:
    """Of the mean of at least two numbers; None for fewer.

    Raises:
        ImportError: scipy is missing (``pip install "amp-plugin[plots]"``).
    """
    from scipy import stats  # which a sweep without tables does not need

    if len(numbers) < 2:
        return None
    half = stats.t.ppf((1 + _LEVEL) / 2, len(numbers) - 1) * stdev(numbers) / len(numbers) ** 0.5
    return Interval(mean(numbers), mean(numbers) - half, mean(numbers) + half)


def paired(reference: Row | None, row: Row, name: str) -> Interval | None:
    """The reference's metric minus the row's, over the seeds that both have; None for fewer than two."""
    if reference is None or reference is row:
        return None
    theirs, ours = reference.measured(name), row.measured(name)
    return interval([theirs[seed] - ours[seed] for seed in theirs.keys() & ours.keys()])


def reference_of(rows: Sequence[Row], method: str = REFERENCE) -> Row | None:
    """What others are compared with: a method (ERM unless told) with the hyper-parameters that have most seeds."""
    return max((row for row in rows if row.method == method), key=lambda row: len(row.runs), default=None)


def rows_of(chosen: Selection, ledger: Sequence[Record]) -> dict[Setting, list[Row]]:
    """The rows of ERM and the chosen methods by setting, in the order of methods.yaml; without a run, none.

    Raises:
        ValueError: a run is there twice.
    """
    found: dict[Setting, list[Row]] = {}
    runs = [r for r in ledger if not is_trial(r) and (chosen.seeds is None or r["settings"]["seed"] in chosen.seeds)]
    for setting in chosen.settings():
        matcher = _Matcher(chosen.scale, setting)
        rows: dict[tuple[str, tuple[Any, ...]], Row] = {}
        for run in runs:
            if (match := matcher.match(run)) is None:
                continue
            method, values = match
            if chosen.methods is not None and method not in (REFERENCE, *chosen.methods):
                continue
            row = rows.setdefault((method, tuple(values.values())), Row(method, values))
            seed = run["settings"]["seed"]
            if seed in row.runs:
                raise ValueError(f"the ledger has {row.label()} on {setting.dataset}, seed {seed}, twice; keep one")
            row.runs[seed] = run
        if rows:
            order = list(methods())
            found[setting] = [rows[k] for k in sorted(rows, key=lambda k: (order.index(k[0]), *map(str, k[1])))]
    return found


class _Matcher:
    """Which method a run of one setting is of, whatever its hyper-parameters."""

    def __init__(self, scale: Scale, setting: Setting) -> None:
        self._scale, self._setting = scale, setting
        self._expected: dict[str, dict[str, Any]] = {}

    def match(self, run: Record) -> tuple[str, dict[str, Any]] | None:
        """The method and the values of its hyper-parameters.

        ERM comes first: the others that train with SGD differ from it by an option that is off in ERM's runs.
        """
        model = published().models[self._setting.model]
        settings = run["settings"]
        if (settings["dataset"], settings["model"]) != (self._setting.dataset, model.architecture):
            return None
        ours = comparable(settings)
        for method in methods():
            if method not in self._expected:
                self._expected[method] = expected(Cell(self._setting, method, 0), self._scale)
            names = {
                name: f"model_kwargs.{model.dropout}" if name == "dropout" else name
                for name in tunable(self._scale, self._setting, method)
            }
            if same(ours, self._expected[method], free={"seed", *names.values()}):
                return method, {name: ours[key] for name, key in names.items() if key in ours}
        return None
