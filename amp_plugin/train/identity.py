"""Check that a run, its folder and its checkpoints belong together, before anything takes its time.

The settings of a run stand in the ``trainer_state.json`` of each checkpoint, so a checkpoint has them or is not there.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from amp_plugin.files import FileError, blamed, check_safetensors, check_types, read_json
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments, default_folder
from amp_plugin.train.run_folder import RECORD
from amp_plugin.trainer.checkpoints import LAST, last_checkpoint
from amp_plugin.trainer.resuming import ADVICE, read_trainer_state

Settings = Mapping[str, Any]

# The same training may go on with other values of these: they choose its length, what is written and where it runs.
_LENGTH = ("num_train_epochs", "max_steps")
_FREE = (
    "corrupted_test_images cpu_threads dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor"
    " greater_is_better load_best_model_at_end metric_for_best_model per_device_eval_batch_size use_cpu"
)
_FREE_PREFIXES = ("eval_", "logging_", "save_")
_DATA = {"train": "the examples to train on", "test": "the examples to test on", "classes": "the names of the classes"}
# What a run draws or tells of itself, and `amp_plugin.flatness` of it, holds for that run alone.
RESULTS = (
    *("README.md", RECORD, "all_results.json", "trainer_state.json"),
    *("curves.png", "confusion.png", "reliability.png", "landscape.png", "landscape_line.png"),
)


class RunSettings(TrainerCallback, ExportableState):
    """Have every checkpoint tell the settings of its run, and hashes of its data.

    Args:
        settings: what `amp_plugin.train.settings.settings_of` returns.
        data: what `amp_plugin.train.tasks.Task.fingerprints` returns.
    """

    def __init__(self, settings: Settings, data: Mapping[str, str] | None = None) -> None:
        self._settings, self._data = _as_json(settings), dict(data or {})

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into the state of a checkpoint."""
        return {"args": {"settings": self._settings, "data": self._data}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the settings into a state that comes from a checkpoint without them."""
        state.stateful_callbacks[type(self).__name__] = self.state()


def checkpoint_to_continue(training: RecipeArguments) -> str | None:
    """Return the folder of the checkpoint that ``--resume_from_checkpoint`` means; None for a new run.

    Raises:
        ValueError: There is no such checkpoint.
    """
    asked, folder = training.checkpoint_to_resume(), Path(str(training.output_dir))
    if not asked:
        return None
    if asked is True or asked == LAST:
        last = last_checkpoint(folder)
        if last is None and asked is True:
            raise ValueError(f"there is no complete checkpoint to resume from in {str(folder)!r}")
        return last
    if not (Path(asked) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {asked}: it has no {TRAINER_STATE_NAME}; give the folder of a checkpoint"
            " (checkpoint-STEP), or 'last'"
        )
    return str(asked)


def check_checkpoint(checkpoint: str, settings: Settings, training: RecipeArguments) -> list[str]:
    """Check that a training with these settings can go on from a checkpoint; return what the user should know.

    Raises:
        ValueError: A file of the checkpoint is missing or damaged, or its run had other settings.
    """
    _check_files(Path(checkpoint), training)
    state = _state_of(Path(checkpoint))
    saved = _told(state).get("settings")
    if saved is None:
        return [f"{checkpoint!r} does not tell the settings of its run: nobody checks that they are those of this one"]
    changed = changes(saved, settings)
    if differ := {name: c for name, c in changed.items() if not _may_change(name)}:
        raise ValueError(
            f"{checkpoint!r} was made with other settings: {_listed(differ)}; give the same ones to continue, or"
            " another --output_dir to start a new run"
        )
    _check_best(state, changed, training)
    longer = {name: c for name, c in changed.items() if name in _LENGTH}
    epochs, steps = training.num_train_epochs, training.max_steps
    made, enough = (state["global_step"], steps) if steps > 0 else (state["epoch"] or 0, epochs)
    if longer and made > enough:
        raise ValueError(
            f"{checkpoint!r} is {made:g} {'steps' if steps > 0 else 'epochs'} old, which is more than the {enough:g}"
            " asked for; give an earlier checkpoint, or another --output_dir"
        )
    kept = "; the learning rate drops where it would have" if training.lr_scheduler_type == "steps" else ""
    return [f"the run is given another length: {_listed(longer)}{kept}"] if longer else []


def check_data(checkpoint: str, data: Mapping[str, str], name: str) -> None:
    """Check that the data set of this name holds what it held for the run of a checkpoint, if the checkpoint tells.

    Raises:
        ValueError: The examples, their labels or the names of the classes have changed.
    """
    saved = _told(_state_of(Path(checkpoint))).get("data") or {}
    changed = [words for part, words in _DATA.items() if part in saved and saved[part] != data[part]]
    if changed:
        raise ValueError(
            f"{checkpoint!r} was made with other data: in data set {name!r} {' and '.join(changed)} have changed since;"
            " give the data as they were to continue, or another --output_dir to start a new run"
        )


def check_new_run(settings: Settings, data: DataArguments, model: ModelArguments, training: RecipeArguments) -> None:
    """Check that a new run mixes with no other in its folder, and under the default name replaces none but its like.

    Raises:
        ValueError: The folder holds checkpoints, or has the default name and holds a run with other settings.
    """
    folder = Path(str(training.output_dir))
    if (last := last_checkpoint(folder)) is not None:
        raise ValueError(
            f"{str(folder)!r} holds {Path(last).name} of an earlier run: --resume_from_checkpoint {LAST} continues that"
            " run; for a new one give another --output_dir, or delete the old checkpoints"
        )
    if str(folder) != default_folder(data, model, training):
        return
    try:
        differ = changes(read_json(folder / RECORD, "")["settings"], settings)
    except (ValueError, LookupError, TypeError):  # no finished run is lost
        return
    if differ := {n: c for n, c in differ.items() if n in _LENGTH or not _may_change(n)}:
        raise ValueError(
            f"{str(folder)!r} holds a finished run with other settings: {_listed(differ)}; give this one an"
            " --output_dir of its own"
        )


def remove_results(folder: Path) -> None:
    """Remove what an earlier run tells of itself, so that it never stands beside the weights or figures of another."""
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)


def changes(then: Settings, now: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, before and now; a setting that was not recorded had its default."""
    then, now, known = _as_json(then), _as_json(now), _as_json(dict(_defaults()))
    pairs = {name: (then.get(name, known[name]), now.get(name, known[name])) for name in known if name in {*then, *now}}
    pairs["world_size"] = (then.get("world_size", 1), now.get("world_size", 1))
    return {name: (before, after) for name, (before, after) in sorted(pairs.items()) if before != after}


def _defaults() -> Iterator[tuple[str, Any]]:
    for kind in (DataArguments, ModelArguments, RecipeArguments):
        for field in fields(kind):
            yield field.name, field.default if field.default_factory is MISSING else field.default_factory()


def _may_change(name: str) -> bool:
    return name in _LENGTH or name in _FREE.split() or name.startswith(_FREE_PREFIXES)


def _listed(differ: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {_shown(then)} -> {_shown(now)}" for name, (then, now) in differ.items())


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def _as_json(settings: Settings) -> dict[str, Any]:
    values = dict(json.loads(json.dumps(dict(settings), default=str)))
    if isinstance(kwargs := values.get("model_kwargs"), str):
        values["model_kwargs"] = json.loads(kwargs)  # spaces and order make no difference
    return values


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """Return the Trainer's state in a checkpoint, with what `RunSettings` has told in it."""
    state, path = read_trainer_state(checkpoint), checkpoint / TRAINER_STATE_NAME
    if missing := [name for name in ("epoch", "global_step", "log_history", "stateful_callbacks") if name not in state]:
        raise FileError(f"{str(path)!r} is damaged (it has no {missing[0]}); {ADVICE}")
    for record in state["log_history"]:
        check_types(record, dict.fromkeys(record, float), path, ADVICE)
    with blamed(path, ADVICE):
        told = _told(state)
        check_types(told, dict.fromkeys(told, dict[str, Any] | None), path, ADVICE)
    return {"best_metric": None, "best_global_step": None, "best_model_checkpoint": None} | state


def _told(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what `RunSettings` has told of a run; nothing where the state of the checkpoint is without."""
    return state["stateful_callbacks"].get(RunSettings.__name__, {}).get("args", {})  # type: ignore[no-any-return]


def _check_best(state: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]], training: RecipeArguments) -> None:
    """Check that the best model so far was chosen as this training would choose it, and is there to be loaded."""
    if state["best_metric"] is None or training.metric_for_best_model is None:
        return
    then, now = changed.get("metric_for_best_model", (None, None))
    if then and now and then.removeprefix("eval_") != now.removeprefix("eval_"):
        raise ValueError(
            f"metric_for_best_model: {then} -> {now}: the best model so far was chosen by {then}; give the same one to"
            " continue, or another --output_dir to start a new run"
        )
    if not training.load_best_model_at_end or not state["best_global_step"]:
        return
    name = f"checkpoint-{state['best_global_step']}"
    if not any(Path(p).is_dir() for p in (Path(str(training.output_dir), name), state["best_model_checkpoint"] or "-")):
        raise ValueError(
            f"{name}, the best model so far, is not in {str(training.output_dir)!r} any more, and"
            " --load_best_model_at_end would need it: put it back, or give --load_best_model_at_end false"
        )


def _check_files(checkpoint: Path, training: RecipeArguments) -> None:
    """Check that the optimizer, the schedule and the random numbers are there, and that no file lacks its end."""
    rank = f"_{training.process_index}" if training.world_size > 1 else ""
    needed = ("optimizer.pt", "scheduler.pt", f"rng_state{rank}.pth")
    if missing := [name for name in needed if not (checkpoint / name).is_file()]:
        raise ValueError(
            f"{str(checkpoint)!r} lacks {' and '.join(missing)}: the training would go on as another one; {ADVICE}"
        )
    for path in (checkpoint / name for name in needed):
        with blamed(path, ADVICE), zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(damaged)
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{str(checkpoint)!r} lacks model.safetensors; {ADVICE}")
    for path in weights:
        check_safetensors(path, ADVICE)
