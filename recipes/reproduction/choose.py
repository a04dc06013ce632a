"""Choose hyper-parameters by the validation runs in the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from reproduction import records
from reproduction.cells import Cell
from reproduction.comparison import in_words
from reproduction.published import Setting
from reproduction.scale import Scale

_HEAD = """\
# Written by `reproduce.py --choose` from the validation runs in the ledger; not by hand. Chosen: the lowest error on
# {images} held-out training images, then the lowest NLL; one seed ({seed}), {trials} trials for every method.
"""


class Choice(NamedTuple):
    """What the trials decided.

    Attributes:
        runs: how many of the trials are in the ledger.
        table: all trials and which were chosen, in Markdown.
        file: for the scale's file of chosen values.
    """

    runs: int
    table: str
    file: str


def choose(scale: Scale, trials: Sequence[Cell], ledger: list[records.Record]) -> Choice:
    """Choose the best trial of each method whose trials are all in the ledger; what was chosen for others stays.

    Args:
        scale: with its tuning.
        trials: of the scale.
        ledger: its runs.

    Raises:
        ValueError: the scale has no trials.
    """
    tuning = scale.tuning
    if tuning is None:
        raise ValueError(f"the scale {scale.name} has no trials to choose from")
    grouped: dict[tuple[Setting, str], list[Cell]] = defaultdict(list)
    for cell in trials:
        grouped[cell.setting, cell.method].append(cell)
    path = scale.chosen_path
    data: dict[str, Any] = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    lines = [
        "| data set | model | augmentation | method | hyper-parameters | validation error % | validation NLL | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    count = 0
    for (setting, method), cells in grouped.items():
        runs = {i: run["metrics"] for i, cell in enumerate(cells) if (run := records.find(cell, scale, ledger))}
        count += len(runs)
        best = (
            min(runs, key=lambda i: (runs[i]["eval_error"], runs[i]["eval_nll"])) if len(runs) == len(cells) else None
        )
        for i, cell in enumerate(cells):
            head = f"| {setting.dataset} | {setting.model} | {setting.augment} | {method} | {in_words(cell.values)}"
            figures = f"{runs[i]['eval_error']:.2f} | {runs[i]['eval_nll']:.3f}" if i in runs else "- | -"
            lines.append(f"{head} | {figures} | {'chosen' if i == best else '' if i in runs else 'to do'} |")
        if best is not None:
            place = data.setdefault(setting.model, {}).setdefault(setting.augment, {}).setdefault(setting.dataset, {})
            place.pop(method, None)  # the order is that of the trials, whenever they were made
            place[method] = {
                "values": cells[best].values,
                "validation_error": round(runs[best]["eval_error"], 4),
                "validation_nll": round(runs[best]["eval_nll"], 4),
            }
    head = _HEAD.format(
        images=tuning.validation_images, seed=tuning.seed, trials=len(next(iter(tuning.trials.values())))
    )
    return Choice(count, "\n".join(lines), head + yaml.safe_dump(data, sort_keys=False))
