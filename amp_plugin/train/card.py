"""Tell the main job's model card what the Trainer does not know: the data, the command and the run to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from amp_plugin.data import ImageBatches
from amp_plugin.data.settings import BUNDLED, SOURCES
from amp_plugin.files import FileError, in_one_line
from amp_plugin.hub.card import RunData
from amp_plugin.report import read_ledger
from amp_plugin.text import for_shell, in_code, in_markdown
from amp_plugin.train.command_line import as_given
from amp_plugin.train.corrupted import corrupted_metrics
from amp_plugin.train.execution import execution_in_words
from amp_plugin.train.method_options import OBJECTIVES
from amp_plugin.train.options import DataArguments, RecipeArguments
from amp_plugin.train.run_folder import RECORD
from amp_plugin.train.settings import decides_outcome
from amp_plugin.train.tasks import Task
from amp_plugin.trainer.described import BALLS, optimizer_in_words, settings_in_words

_SHOWN = ("accuracy", "error", "nll", "ece")
_PRETTY = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", BUNDLED: "a sample of CIFAR-10"}
_LINE = 100
_CORRUPTED = (
    "On {:,} images of that split, corrupted at five severities as"
    " [CIFAR-10-C](https://arxiv.org/abs/1903.12261) corrupts images of 32x32 pixels; means over the severities."
)


def compared_run(path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record, as `amp_plugin.provenance.run_record` made it, of the run to compare with.

    `path` is the output folder of that run; or a ledger, for its last run with these settings and another optimizer.
    """
    file = Path(path) / RECORD if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"--compare_with {path!r}: there is no {str(file)!r}; give the output folder of a finished run of this job,"
            " or the ledger that it was appended to"
        )
    try:
        records = read_ledger(file)
        if file.name != RECORD:
            others = [r for r in records if r["settings"]["optim"] != settings["optim"]]
            records = [r for r in others if not differences(r["settings"], settings)]
        for record in records[-1:]:  # what the card will ask for, which else would fail after the training
            _comparison({"settings": settings, "commit": None, "versions": None}, record)
        if file.name == RECORD and not records:
            raise ValueError("it is empty")
    except Exception as error:  # what is recorded may be anything
        said = error if isinstance(error, FileError) else in_one_line(error)
        raise ValueError(f"--compare_with {path!r}: {str(file)!r} is not a record of runs ({said})") from error
    if not records:
        raise ValueError(
            f"--compare_with {path!r}: no run in it has the settings of this one and another optimizer; give the"
            " output folder of a run to compare with it whatever else differs"
        )
    return records[-1]


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings, except the optimizer's, that both runs have and that differ: theirs and ours.

    A setting that changes the training loss or the labels counts even if one run alone has it.
    """
    ours = json.loads(json.dumps(dict(ours), default=str))
    optimizers = ("optim", *BALLS.values())
    common = [n for n in ours if n in theirs and n not in optimizers and not n.startswith("amp_")]
    compared = {name: (theirs.get(name), ours.get(name)) for name in (*common, *OBJECTIVES, "label_noise")}
    return {name: (t, o) for name, (t, o) in compared.items() if t != o}


def card_details(
    argv: list[str],
    task: Task,
    args: DataArguments,
    training: RecipeArguments,
    *,
    record: Mapping[str, Any],
    compared: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return fields of `amp_plugin.hub.Run` for a finished run; `compared` is the record of another run, if any."""
    rows, note = _comparison(record, compared)
    layout = {"memory format": "channels-last"} if training.channels_last else {}
    return {
        "data": _data(task, args),
        "metrics": _metrics(record),
        "from_scratch": task.new is None,
        "settings": {
            **settings_in_words(training),
            "augmentation": args.augmentation,
            **layout,
            "computed on": in_markdown(execution_in_words(record["execution"])),
        },
        "command": command_line(argv, training.world_size),
        "license": training.hub_license,
        "corrupted": corrupted_metrics(record["metrics"]),
        "corrupted_note": _CORRUPTED.format(0 if task.to_corrupt is None else len(task.to_corrupt)),
        "compared": rows,
        "compared_note": note,
    }


def command_line(argv: list[str], processes: int) -> str:
    """Return a command that repeats a run anywhere, without folders and tokens; `argv` has the recipe's options too."""
    kept = {name: values for name, values in as_given(argv).items() if name == "fast" or decides_outcome(name)}
    launcher = ["torchrun", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    parts = [[*launcher, "-m", "amp_plugin.train"], *([f"--{name}", *values] for name, values in kept.items())]
    whole = " ".join(map(for_shell, parts))
    return whole if len(whole) <= _LINE else " \\\n    ".join(map(for_shell, parts))


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(record["metrics"][f"eval_{name}"]) for name in _SHOWN if f"eval_{name}" in record["metrics"]}


def _data(task: Task, args: DataArguments) -> RunData:
    size = ""
    if isinstance(task.train, ImageBatches):
        height, width = task.train.split.images.shape[1:3]
        size = f"{height}x{width} pixels, "
    held_out = args.validation_images is not None
    bundled, local = args.dataset == BUNDLED, Path(args.dataset).exists()
    source = SOURCES.get(args.dataset)
    name = Path(args.dataset).name if local else args.dataset
    return RunData(
        name=_PRETTY.get(name, name),
        id=name if bundled or local or source is None else source.path,
        on_hub=not (bundled or local),
        config=args.dataset_config_name or (source.config_name if source else None),
        split="validation" if held_out else args.test_split,
        described=f"{task.examples_to_train()}, {len(task.test):,} {'held out' if held_out else 'to test'},"
        f" {size}{len(task.class_names())} classes",
        note="These few images are for trying things out: the results say nothing about CIFAR-10." if bundled else "",
    )


def _comparison(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> tuple[dict[str, dict[str, float]], str]:
    if theirs is None:
        return {}, ""
    label = optimizer_in_words(theirs["settings"])
    if label == optimizer_in_words(ours["settings"]):
        label = f"another run with {label}"
    differ = differences(theirs["settings"], ours["settings"])
    listed = "; ".join(f"`{name}` {_cell(t)}, here {_cell(o)}" for name, (t, o) in differ.items())
    then, now = (record.get("execution", {}).get("data", {}) for record in (theirs, ours))
    of_data = {field.name for field in fields(DataArguments)}
    if ours["settings"].get("label_noise"):
        of_data.add("seed")  # which the noise is drawn by
    if not differ.keys() & of_data and any(then[part] != now.get(part) for part in then):
        listed = "; ".join(filter(None, [listed, "the data, which have changed under their name"]))
    same = f"The runs also differ in: {listed}." if listed else "All settings but the optimizer are the same."
    if theirs.get("commit") != ours["commit"] or theirs.get("versions") != ours["versions"]:
        same += " They were made with different versions of the software."
    return {label: _metrics(theirs)}, f"{same} Each row is a single run; runs that differ in the seed alone differ too."


def _cell(value: Any) -> str:
    return "not set" if value is None else in_code(value)
