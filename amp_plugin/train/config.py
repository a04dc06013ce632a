"""A run's settings in a file that the main job takes again."""

from __future__ import annotations

from pathlib import Path

import yaml

from amp_plugin.provenance import versions
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments, settings_of


def write_config(path: Path, data: DataArguments, model: ModelArguments, training: RecipeArguments) -> None:
    """Write all settings that decide a run's outcome to a YAML file: ``train.py FILE`` makes the same run again.

    What cannot be an option of a shared file is told in its comments: the number of processes, and that the data came
    from a folder.

    Args:
        path: the file.
        data: of the run.
        model: of the run.
        training: of the run.
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
    path.write_text("".join(f"# {line}\n" for line in lines) + yaml.safe_dump(settings, sort_keys=False))
