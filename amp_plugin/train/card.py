"""What the main job's model card tells beyond what the Trainer knows: data, command, the run compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amp_plugin.data import ImageBatches
from amp_plugin.data.settings import BUNDLED, SOURCES
from amp_plugin.hub.card import RunData
from amp_plugin.report import read_ledger
from amp_plugin.train.command import command_line
from amp_plugin.train.described import card_words, trained_with
from amp_plugin.train.method_options import OBJECTIVES, RADII
from amp_plugin.train.options import DataArguments, RecipeArguments
from amp_plugin.train.tasks import Task

RECORD = "run.json"
_SHOWN = ("accuracy", "error", "nll", "ece")
_PRETTY = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", BUNDLED: "a sample of CIFAR-10"}


def compared_run(path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the run to compare with.

    Args:
        path: its output folder; or a ledger, for the last run in it with these settings and another optimizer.
        settings: of the run that is compared.

    Returns:
        What `amp_plugin.provenance.run_record` returned for it.

    Raises:
        ValueError: there is no such run.
    """
    file = Path(path) / RECORD if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"--compare_with {path!r}: there is no {str(file)!r}; give the output folder of a finished run of this job,"
            " or the ledger that it was appended to"
        )
    try:
        records = read_ledger(file)
        if file.name == RECORD:
            return dict(records[-1])
        others = [r for r in records if r["settings"]["optim"] != settings["optim"]]
        return dict(next(r for r in reversed(others) if not differences(r["settings"], settings)))
    except StopIteration:
        raise ValueError(
            f"--compare_with {path!r}: no run in it has the settings of this one and another optimizer; give the"
            " output folder of a run to compare with it whatever else differs"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"--compare_with {path!r}: {str(file)!r} is not a record of runs ({error!r})") from error


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings, but for the optimizer's, that two runs have both and that differ: theirs and ours.

    What changes the training loss counts even if one run alone has it.
    """
    ours = json.loads(json.dumps(dict(ours), default=str))
    optimizers = ("optim", "sync_ascent", *(option for option, _ in RADII.values()))
    common = [n for n in ours if n in theirs and n not in optimizers and not n.startswith("amp_")]
    compared = {name: (theirs.get(name), ours.get(name)) for name in (*common, *OBJECTIVES)}
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
    """Fields of `amp_plugin.hub.Run` for a finished run.

    Args:
        argv: the job's arguments as given.
        task: what was trained and tested on.
        args: which data.
        training: how.
        record: of this run.
        compared: of another one, if it shall be compared.
    """
    words = card_words(training)
    settings = {**words["settings"], "augmentation": args.augmentation}
    if training.channels_last:
        settings["memory format"] = "channels-last"
    rows, note = _comparison(training, record, compared)
    return {
        "data": _data(task, args),
        "metrics": _metrics(record),
        "from_scratch": task.new is None,
        "optimizer": words["optimizer"],
        "settings": settings,
        "command": command_line(argv, training.world_size),
        "license": training.hub_license,
        "compared": rows,
        "compared_note": note,
    }


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: record["metrics"][f"eval_{name}"] for name in _SHOWN if f"eval_{name}" in record["metrics"]}


def _data(task: Task, args: DataArguments) -> RunData:
    kind, size = task.train.split.kind, ""
    if isinstance(task.train, ImageBatches):
        height, width = task.train.split.images.shape[1:3]
        size = f"{height}x{width} pixels, "
    held_out = args.validation_images is not None
    bundled, local = args.dataset == BUNDLED, Path(args.dataset).exists()
    source = SOURCES.get(args.dataset)
    name = Path(args.dataset).name if local else args.dataset
    split = "validation" if held_out else args.test_split
    return RunData(
        name=_PRETTY.get(name, name),
        id=name if bundled or local or source is None else source.path,
        on_hub=not (bundled or local),
        config=args.dataset_config_name or (source.config_name if source else None),
        split=split,
        described=f"{len(task.train):,} {kind} to train, {len(task.test):,} {'held out' if held_out else 'to test'},"
        f" {size}{len(task.class_names())} classes",
        note="These few images are for trying things out: the results say nothing about CIFAR-10." if bundled else "",
    )


def _comparison(
    training: RecipeArguments, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None
) -> tuple[dict[str, dict[str, float]], str]:
    if theirs is None:
        return {}, ""
    label = trained_with(theirs["settings"])
    if label == trained_with(ours["settings"]):
        label = f"another run with {card_words(training)['optimizer']}"
    differ = differences(theirs["settings"], ours["settings"])
    listed = "; ".join(f"`{name}` {_cell(t)}, here {_cell(o)}" for name, (t, o) in differ.items())
    same = f"The runs also differ in: {listed}." if differ else "All settings but the optimizer are the same."
    if theirs.get("commit") != ours["commit"] or theirs.get("versions") != ours["versions"]:
        same += " They were made with different versions of the software."
    return {label: _metrics(theirs)}, f"{same} Each row is a single run; runs that differ in the seed alone differ too."


def _cell(value: Any) -> str:
    return "not set" if value is None else f"`{value}`"
