"""Write what a run leaves in its folder, and open a finished run again from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback
from transformers.trainer_utils import PredictionOutput

from amp_plugin.data import collate
from amp_plugin.files import FileError, check_types, read_json
from amp_plugin.provenance import versions
from amp_plugin.report import plot_confusion, plot_curves, plot_reliability
from amp_plugin.report.ledger import check_record
from amp_plugin.text import tell
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments
from amp_plugin.train.plain_yaml import plain_yaml
from amp_plugin.train.settings import settings_of
from amp_plugin.train.tasks import Task, make_task
from amp_plugin.trainer.checkpoints import SaveError, explained
from amp_plugin.whole_file import write_text

RECORD, RECORDS = "run.json", "metrics.jsonl"


def write_config(path: Path, data: DataArguments, model: ModelArguments, training: RecipeArguments) -> None:
    """Write all settings that decide a run's outcome to a YAML file: ``train.py FILE`` makes the same run again.

    Comments in the file tell what cannot be an option of a shared file: the number of processes, and that the data came
    from a folder.
    """
    settings = {name: value for name, value in settings_of(data, model, training).items() if value is not None}
    processes = settings.pop("world_size")
    settings["model_kwargs"] = model.parsed_model_kwargs()
    lines = ["The settings of this run; train.py takes this file and makes it again. Options after it win."]
    if processes > 1:
        lines.append(f"It was made in {processes} processes: torchrun --nproc_per_node {processes} makes the same.")
    if data.data_root is not None:
        lines.append("Its data came from a folder: give --data_root again.")
    lines.append("With " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".")
    with explained(path.name, path.parent):
        write_text(path, "".join(f"# {line}\n" for line in lines) + plain_yaml(settings))


class RecordsFile(TrainerCallback):
    """Append each record of ``trainer.state.log_history`` to a JSON Lines file when it is logged.

    A run that is killed keeps its records. A run that continues from a checkpoint first drops the records after the
    checkpoint, whose steps it makes again; a run from the beginning starts the file anew. Numbers that are not finite
    become null. The main process alone writes the file. A record that cannot be written ends no training: it is told
    once, and the next record tries to write all of them.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._told = path, False
        self._complete = True  # the file holds all records that are logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave in the file the records that the checkpoint holds, none without a checkpoint."""
        if state.is_world_process_zero:
            self._write_all(state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest record."""
        if not state.is_world_process_zero:
            return
        try:
            if self._complete:
                self._complete = False
                with explained(self._path.name, self._path.parent), self._path.open("a", encoding="utf-8") as records:
                    records.write(_line(state.log_history[-1]))
            else:
                self._write_all(state.log_history)
            self._complete = True
        except SaveError as error:
            if not self._told:
                tell(f"note: {error}; the training goes on")
            self._told = True

    def _write_all(self, records: list[dict[str, Any]]) -> None:
        with explained(self._path.name, self._path.parent):
            write_records(self._path, records)


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records of ``trainer.state.log_history`` as JSON Lines, all of them or none."""
    write_text(path, "".join(map(_line, records)))


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def draw_pictures(
    folder: Path,
    title: str,
    records: list[dict[str, Any]],
    tested: PredictionOutput | None,
    names: list[str],
    where: str,
    attempt: Callable[[Path, Callable[[], None]], Any] = lambda path, draw: draw(),
) -> None:
    """Draw the training's curves, and the confusion matrix and reliability diagram of its test; print where they are.

    The `records` are ``trainer.state.log_history``, and `where` is what the test was made on: "test" or "validation".
    The function `attempt` draws each picture, and may go on after one that cannot be drawn.
    """
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        print(f'pictures left out: {error.name} is missing (pip install "amp-plugin[plots]")')
        return

    def draw(name: str, path: Path, plot: Callable[..., None], *shown: Any, **options: Any) -> None:
        def step() -> None:
            plot(*shown, **options)
            tell(f"{name}: {path}")

        attempt(path, step)

    curves, confusion, reliability = (folder / f"{n}.png" for n in ("curves", "confusion", "reliability"))
    draw("curves", curves, plot_curves, records, curves, title, where=where)
    if tested is not None:
        logits, labels = tested.predictions, tested.label_ids
        subject = f"{title}: {len(logits):,} {where} images"
        draw("confusion matrix", confusion, plot_confusion, logits, labels, names, confusion, subject)
        draw("reliability diagram", reliability, plot_reliability, logits, labels, reliability, subject)


@dataclass(frozen=True)
class SavedRun:
    """Hold a finished run."""

    folder: Path
    settings: Mapping[str, Any]  # by the names of the options
    metrics: Mapping[str, float]
    task: Task  # the model with the trained weights, on the device at hand, and the data without augmentation

    def training_batches(self, examples: int | None, batch_size: int) -> DataLoader[Any]:
        """Load so many training examples, or all, as the model takes them: always the same, equally many a class."""
        train: Any = self.task.train
        count = len(train) if examples is None else examples
        # The classes of all examples need not be equally many.
        indices = range(count) if count == len(train) else train.split.subset_indices(count).tolist()
        chosen: Any = Subset(train, indices)
        return DataLoader(chosen, batch_size, collate_fn=collate)


def open_run(folder: str | Path, *, dataset: str | None = None, data_root: str | None = None) -> SavedRun:
    """Open the output folder of a finished run; `dataset` stands in for the recorded one, e.g. where that was a folder.

    `data_root` is a folder in the layout of the Hub to load the data from, instead of the Hub.
    """
    folder = Path(folder)
    path, advice = folder / RECORD, "give the output folder of a finished run"
    if not path.exists():
        raise ValueError(f"{str(folder)!r} has no {RECORD}: {advice}")
    record = read_json(path, advice)
    try:
        check_record(record)
    except ValueError as error:
        raise FileError(f"{str(path)!r} is not the record of a run: {error}; {advice}") from error
    settings, metrics = record["settings"], record["metrics"]
    check_types(settings, get_type_hints(DataArguments) | {"freeze_backbone": bool}, path, advice)
    recorded = {f.name: settings[f.name] for f in fields(DataArguments) if f.name in settings}
    recorded |= {"data_root": data_root, "augment": "default" if recorded.get("text_column") else "none"}
    if dataset is not None:
        recorded["dataset"] = dataset
    args = RecipeArguments(output_dir=str(folder), seed=settings["seed"])  # the seed of the label noise
    # The folder is a checkpoint like any other, with the classes of its own data set.
    model = ModelArguments(pretrained=str(folder), freeze_backbone=settings.get("freeze_backbone", False))
    task = make_task(DataArguments(**recorded), model, args)
    if task.new:
        raise ValueError(f"{str(folder)!r} does not hold the weights of {', '.join(task.new)} for {task.dataset}")
    then = dict(record.get("execution") or {}).get("data", task.fingerprints)
    if dataset is None and then != task.fingerprints:
        tell(f"note: data set {task.dataset!r} has changed since the run in {str(folder)!r} was made")
    torch.nn.Module.to(task.model, args.device)  # transformers hides the signature
    return SavedRun(folder, settings, metrics, task)
