"""Choose hyper-parameters by the validation runs in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import yaml
from guides.page import table

from amp_plugin.text import in_markdown
from reproduction import records
from reproduction.cells import Cell
from reproduction.comparison import in_words
from reproduction.scale import Scale, read_chosen

_HEAD = """\
# Written by `reproduce.py --choose` from the validation runs in the ledger; not by hand. Chosen: the lowest error on
# {images} held-out training images, then the lowest NLL; one seed ({seed}), {trials} trials for every method.
"""
_HEADS = ("data set", "model", "augmentation", "method", "hyper-parameters", "validation error %", "validation NLL", "")


class Choice(NamedTuple):
    """How many trials the ledger has, all trials in Markdown, and the content of the scale's file of chosen values."""

    runs: int
    table: str
    file: str


def choose(scale: Scale, trials: Sequence[Cell], ledger: list[records.Record]) -> Choice:
    """Choose the best trial of each method whose trials are all in the ledger; what was chosen for others stays."""
    tuning = scale.tuning
    if tuning is None:
        raise ValueError(f"the scale {scale.name} has no trials to choose from")
    path = scale.chosen_path
    data = read_chosen(path) if path.is_file() else {}
    rows, count = [], 0
    for ((model, augment, dataset), method), group in groupby(trials, lambda cell: (cell.setting, cell.method)):
        cells = list(group)
        found = {i: run["metrics"] for i, cell in enumerate(cells) if (run := records.find(cell, scale, ledger))}
        runs = {
            i: (records.known(metrics, "eval_error"), records.known(metrics, "eval_nll"))
            for i, metrics in found.items()
        }
        count += len(runs)
        best = min(runs, key=runs.__getitem__) if len(runs) == len(cells) else -1
        for i, cell in enumerate(cells):
            figures = ["-", "-", "to do"]
            if i in runs:
                chosen = "chosen" if i == best else ""
                figures = [f"{runs[i][0]:.2f}", f"{runs[i][1]:.3f}", chosen]
            rows.append([*map(in_markdown, (dataset, model, augment, method, in_words(cell.values))), *figures])
        if best in runs:
            place = data.setdefault(model, {}).setdefault(augment, {}).setdefault(dataset, {})
            place.pop(method, None)  # the order is that of the trials, whenever they were made
            place[method] = {
                "values": dict(cells[best].values),  # the YAML has no references to those of other data sets
                "validation_error": round(runs[best][0], 4),
                "validation_nll": round(runs[best][1], 4),
            }
    head = _HEAD.format(
        images=tuning.validation_images, seed=tuning.seed, trials=len(next(iter(tuning.trials.values())))
    )
    text = table(_HEADS, rows).replace("|  |", "| |", 1)  # the last heading is empty
    return Choice(count, text, head + yaml.safe_dump(data, sort_keys=False))
