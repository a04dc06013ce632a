"""The ledger: which cells stand in it, found by their settings."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from amp_plugin.report import read_ledger
from amp_plugin.train.command_line import as_options
from amp_plugin.train.options import parse
from amp_plugin.train.settings import settings_of
from reproduction.cells import Cell
from reproduction.scale import Scale, processes

Record = dict[str, Any]
Settings = dict[str, Any]

# These may differ between two runs of one cell.
_CADENCE = ("eval_", "logging_", "save_")
_ELSEWHERE = {"cpu_threads", "use_cpu", "per_device_eval_batch_size", "dataloader_num_workers", "dataloader_pin_memory"}


def read(ledger: Path) -> list[Record]:
    """Return the runs in a ledger; none if there is no such file."""
    return read_ledger(ledger) if ledger.exists() else []


def train_argv(cell: Cell, scale: Scale) -> list[str]:
    """Return what train.py is told about the training."""
    return [*as_options(cell.options(scale), str(scale.path)), *scale.train_args]


def expected(cell: Cell, scale: Scale) -> Settings:
    """Return the settings that the cell's run will have, as `comparable` returns them."""
    try:
        parsed = parse(train_argv(cell, scale))
    except ValueError as error:
        raise ValueError(f"{cell}: {error}") from None
    return comparable({**settings_of(*parsed), "world_size": processes(scale.launch)})


def comparable(settings: Mapping[str, Any]) -> Settings:
    """Return the settings that decide the outcome, as JSON keeps them, the model's arguments one by one."""
    plain: Settings = json.loads(json.dumps(dict(settings), default=str))
    kwargs = json.loads(plain.pop("model_kwargs", None) or "{}")
    plain |= {f"model_kwargs.{name}": value for name, value in kwargs.items()}
    return {n: v for n, v in plain.items() if n not in _ELSEWHERE and not n.startswith(("_", *_CADENCE))}


def same(one: Settings, other: Settings, free: Collection[str] = ()) -> bool:
    """Return whether two `comparable` settings agree but for the names that are free.

    A setting that a version does not record has its default.
    """
    names = (one.keys() | other.keys()).difference(free)
    defaults = _defaults()
    return all(one.get(n, defaults.get(n)) == other.get(n, defaults.get(n)) for n in names)


def find(cell: Cell, scale: Scale, records: list[Record]) -> Record | None:
    """Return the cell's run, the newest if there are several; None if the cell has no run."""
    wanted = expected(cell, scale)
    return next((r for r in reversed(records) if same(comparable(r["settings"]), wanted)), None)


def known(metrics: Mapping[str, float], name: str) -> float:
    """Return a metric, of which less is better; infinity for a run that diverged, or does not tell it."""
    value = metrics.get(name, math.inf)
    return math.inf if math.isnan(value) else value


def is_trial(record: Record) -> bool:
    """Return whether a run reports on held-out training images, not on the test split."""
    return bool(record["settings"].get("validation_images"))


@cache
def _defaults() -> Settings:
    settings = settings_of(*parse([]))
    return {n: v for n, v in comparable(settings).items() if not n.startswith("model_kwargs.")}
