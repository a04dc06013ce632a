"""How flat are the minima of finished runs of the main job, side by side on the same training images.

The command measures the worst loss in the ball around the weights, the largest eigenvalues and the trace of the loss's
Hessian, and the loss along random filter-normalised directions. Give a run with AMP and one without, on the same data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from transformers.utils import logging

from amp_plugin.command import run_command
from amp_plugin.core.perturbation import NORMS
from amp_plugin.flatness.curvature import require_library
from amp_plugin.flatness.measures import MEASURES, Measures, MeasureSettings, measure, measures_table
from amp_plugin.flatness.objective import Objective
from amp_plugin.flatness.pictures import plot_landscapes
from amp_plugin.text import in_markdown, tell, visible
from amp_plugin.train.run_folder import SavedRun, open_run

# Runs that differ in one of these options would be measured on different data.
_DATA = (
    *("dataset", "dataset_config_name", "image_column", "text_column", "text_pair_column", "label_column"),
    *("train_split", "train_images", "validation_images", "image_size"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m amp_plugin.flatness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="Output folders of finished runs.")
    add("--names", nargs="+", metavar="NAME", help="Names of the runs. Default: the folders' names.")
    add("--output_dir", default="flatness", type=Path, help="Folder for the results. [flatness]")
    measures = f"Measures to make: {', '.join(MEASURES)}. [all]"
    add("--measures", nargs="+", metavar="MEASURE", choices=MEASURES, default=list(MEASURES), help=measures)
    add("--images", type=int, metavar="N", help="Training images (or texts) to measure on. Default: 500, or all.")
    add("--batch_size", type=int, default=250, help="Examples of a pass, which change the memory only. [250]")
    add("--data_root", help="Folder in the layout of the Hub to load the data from, instead of the Hub.")
    add("--dataset", help="Data set instead of the recorded one, where that was a folder.")
    add("--training_mode", action="store_true", help="BatchNorm uses the statistics of each batch, and dropout is on.")
    add("--epsilon", type=float, help="Radius of the ball. Default: the first run's --amp_epsilon.")
    add("--norm", choices=NORMS, help="Norm of the ball. Default: the first run's --amp_norm.")
    for field in fields(MeasureSettings):
        if text := field.metadata.get("help"):
            add(f"--{field.name}", type=type(field.default), default=field.default, help=f"{text} [{field.default}]")
    arguments = parser.parse_args(argv)
    if arguments.names and len(set(arguments.names)) != len(arguments.folders):
        parser.error(f"--names: give {len(arguments.folders)} different names, one a folder")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Measure, write and print."""
    arguments = parse(argv)
    if "hessian" in arguments.measures:
        require_library()
    import matplotlib  # noqa: F401  # a missing library fails now and not after an hour

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # transformers shows one for reading a file
    runs = {}
    for name, folder in zip(arguments.names or _names(arguments.folders), arguments.folders, strict=True):
        runs[name] = open_run(folder, dataset=arguments.dataset, data_root=arguments.data_root)
    first = next(iter(runs.values()))
    for run in runs.values():
        _check_same_data(first, run)
    settings = _settings(arguments, first)
    out: Path = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    examples = min(500, len(first.task.train)) if arguments.images is None else arguments.images
    measured = {}
    for name, run in runs.items():
        tell(f"measuring {visible(name)}")
        batches = run.training_batches(examples, arguments.batch_size)
        objective = Objective(run.task.model, batches, training=arguments.training_mode)
        measured[name] = measure(objective, settings, tuple(arguments.measures))
    where = f"{examples:,} training {first.task.train.split.kind} of {first.task.dataset}"
    pictures = _draw(measured, out, where)
    page = _page(measured, runs, settings, where, pictures, training=arguments.training_mode)
    (out / "flatness.md").write_text(page, encoding="utf-8")
    record = {
        "measured_on": where,
        "training_mode": arguments.training_mode,
        "settings": asdict(settings),
        "models": {name: found.as_dict() for name, found in measured.items()},
    }
    (out / "flatness.json").write_text(json.dumps(record, allow_nan=False) + "\n")
    tell(f"{page}\nresults: {visible(str(out))}")


def _names(folders: Sequence[str]) -> list[str]:
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    if len(set(folders)) != len(folders):
        raise ValueError("a folder is given twice")
    return list(folders)


def _settings(arguments: argparse.Namespace, first: SavedRun) -> MeasureSettings:
    given = {f.name: getattr(arguments, f.name) for f in fields(MeasureSettings)}
    for name in ("epsilon", "norm"):
        if given[name] is None:
            given[name] = first.settings[f"amp_{name}"]
    return MeasureSettings(**given)


def _check_same_data(first: SavedRun, run: SavedRun) -> None:
    differ = [name for name in _DATA if first.settings.get(name) != run.settings.get(name)]
    if differ:
        told = "; ".join(f"{n} {first.settings.get(n)!r} and {run.settings.get(n)!r}" for n in differ)
        raise ValueError(f"{first.folder} and {run.folder} were trained on different data, so not comparable: {told}")


def _draw(measured: Mapping[str, Measures], out: Path, where: str) -> list[str]:
    """Draw the landscapes that all models have, and return the names of the pictures."""
    drawn = []
    for kind, how, file in (("line", "along a line", "landscape_line.png"), ("plane", "in a plane", "landscape.png")):
        scapes = {name: getattr(found, kind) for name, found in measured.items()}
        if all(scapes.values()):
            plot_landscapes(scapes, out / file, f"Loss {how} through the weights:\n{where}")
            drawn.append(file)
    return drawn


def _page(
    measured: Mapping[str, Measures],
    runs: Mapping[str, SavedRun],
    settings: MeasureSettings,
    where: str,
    pictures: Sequence[str],
    *,
    training: bool,
) -> str:
    held_out = next(iter(runs.values())).settings.get("validation_images") is not None
    of_run: dict[str, dict[str, str]] = {
        f"{'validation' if held_out else 'test'} error, from the run (%)": {
            n: f"{run.metrics['eval_error']:.2f}" for n, run in runs.items()
        },
        "trained with": {n: in_markdown(run.settings["optim"]) for n, run in runs.items()},
    }
    found = next(iter(measured.values()))
    notes = [f"Measured on {in_markdown(where)}, without augmentation, in {'training' if training else 'eval'} mode."]
    if found.sharpness is not None:
        ball = "around every tensor" if settings.norm == "tensor" else "around all weights together"
        notes.append(
            f"Sharpness: the highest rise of the loss that {settings.steps} steps of projected gradient ascent find in"
            f" the ball of radius {settings.epsilon:g} {ball}."
        )
    if found.eigenvalues is not None and found.trace is not None:
        notes.append(
            f"Eigenvalues: Lanczos, {found.eigenvalues.products} Hessian-vector products, ± residual. Trace:"
            f" Hutchinson, {found.trace.probes} probes, ± standard error."
        )
    if pictures:
        notes.append(
            f"Landscapes: random directions of seeds {settings.seed} and {settings.seed + 1}, filter-normalised, biases"
            " and norm layers fixed."
        )
    if found.sharpness is not None or found.trace is not None:
        notes.append(
            "Sharpness and curvature depend on the scale of the weights; the landscapes' steps are relative to it."
            " Compare models that fit the images equally well: cross-entropy is flat where it is almost 0."
        )
    images = [f"![loss landscape]({name})" for name in pictures]
    return "\n\n".join(["# Flatness", measures_table(measured, of_run), " ".join(notes), *images]) + "\n"


def run(argv: Sequence[str]) -> str | None:
    """Call `main`, and return what the user has to mend."""
    try:
        main(argv)
    except ImportError as error:
        hint = "" if "pip install" in str(error) else ' (pip install "amp-plugin[flatness]")'
        return f"error: {error}{hint}"
    except (ValueError, OSError) as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    run_command(lambda: run(sys.argv[1:]), ())
