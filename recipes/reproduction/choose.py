"""Choose hyper-parameters by the validation runs in the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import yaml

from reproduction import records
from reproduction.cells import Cell
from reproduction.published import Setting
from reproduction.scale import Scale

_HEAD = """\
# Written by `reproduce.py --choose` from the validation runs in the ledger; not by hand. Chosen: the lowest error on
# {images} held-out training images, then the lowest NLL; one seed ({seed}), {trials} trials for every method.
"""


def choose(scale: Scale, trials: Sequence[Cell], ledger: list[records.Record]) -> str:
    """Write the best trial of each method whose trials are all in the ledger to the scale's file of chosen values.

    What the file has of others stays.

    Args:
        scale: with its tuning.
        trials: of the scale.
        ledger: its runs.

    Returns:
        What was chosen, and what cannot be yet, a line each.
    """
    assert scale.tuning is not None
    grouped: dict[tuple[Setting, str], list[Cell]] = defaultdict(list)
    for cell in trials:
        grouped[cell.setting, cell.method].append(cell)
    path, said = scale.chosen_path, []
    data: dict[str, Any] = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    for (setting, method), cells in grouped.items():
        runs = [(cell, record) for cell in cells if (record := records.find(cell, scale, ledger)) is not None]
        where = f"{setting.dataset} {setting.model} {setting.augment}: {method}"
        if len(runs) < len(cells):
            said.append(f"{where}: only {len(runs)} of {len(cells)} trials are in the ledger")
            continue
        best, record = min(runs, key=lambda run: (run[1]["metrics"]["eval_error"], run[1]["metrics"]["eval_nll"]))
        metrics = record["metrics"]
        place = data.setdefault(setting.model, {}).setdefault(setting.augment, {}).setdefault(setting.dataset, {})
        place[method] = {
            "values": best.values,
            "validation_error": round(metrics["eval_error"], 4),
            "validation_nll": round(metrics["eval_nll"], 4),
        }
        said.append(f"{where}: {best.values}, validation error {metrics['eval_error']:.2f} %")
    tuning = scale.tuning
    head = _HEAD.format(
        images=tuning.validation_images, seed=tuning.seed, trials=len(next(iter(tuning.trials.values())))
    )
    path.write_text(head + yaml.safe_dump(data, sort_keys=False))
    return "\n".join(said)
