"""A finished run of the main job, opened again from its folder: the model with its weights, and its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from amp_plugin.data import collate
from amp_plugin.train.card import RECORD
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments
from amp_plugin.train.tasks import Task, make_task


@dataclass(frozen=True)
class SavedRun:
    """A finished run.

    Attributes:
        folder: of the run.
        settings: of the run, by the names of the options.
        metrics: of the run, such as "eval_error".
        task: its model with the trained weights, on the device at hand, and its data without augmentation.
    """

    folder: Path
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    task: Task

    def training_batches(self, examples: int | None, batch_size: int) -> DataLoader[Any]:
        """Batches of training examples as the model takes them, always the same, equally many of every class.

        Args:
            examples: how many; None for all.
            batch_size: of them.

        Raises:
            ValueError: there are not so many.
        """
        train: Any = self.task.train
        count = len(train) if examples is None else examples
        chosen: Any = Subset(train, train.split.subset_indices(count).tolist())
        return DataLoader(chosen, batch_size, collate_fn=collate)


def open_run(folder: str | Path, *, dataset: str | None = None, data_root: str | None = None) -> SavedRun:
    """Open the output folder of a finished run.

    Args:
        folder: of the run.
        dataset: instead of the recorded name, e.g. where it was a folder.
        data_root: folder in the layout of the Hub to load the data from, instead of the Hub.

    Raises:
        ValueError: it is not the folder of a finished run, or its data cannot be had.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
        settings, metrics = dict(record["settings"]), dict(record["metrics"])
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} has no {RECORD}: give the output folder of a finished run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / RECORD)!r} is not the record of a run: {error}") from error
    recorded = {f.name: settings[f.name] for f in fields(DataArguments) if f.name in settings}
    recorded |= {"data_root": data_root, "augment": "default" if recorded.get("text_column") else "none"}
    if dataset is not None:
        recorded["dataset"] = dataset
    args = RecipeArguments(output_dir=str(folder))
    # The folder is a checkpoint like any other, with the classes of its own data set.
    model = ModelArguments(pretrained=str(folder), freeze_backbone=settings.get("freeze_backbone", False))
    task = make_task(DataArguments(**recorded), model, args)
    if task.new:
        raise ValueError(f"{str(folder)!r} does not hold the weights of {', '.join(task.new)} for {task.dataset}")
    torch.nn.Module.to(task.model, args.device)  # transformers hides the signature
    return SavedRun(folder, settings, metrics, task)
