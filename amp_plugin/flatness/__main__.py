"""How flat are the minima of finished runs of the main job, side by side on the same training images.

The command measures the worst loss in the ball around the weights, the largest eigenvalues and the trace of the loss's
Hessian, and the loss along random filter-normalised directions. Give a run with AMP and one without, on the same data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from amp_plugin.arguments import Parser, different, number, path
from amp_plugin.command import in_words, run_command
from amp_plugin.core.perturbation import NORMS
from amp_plugin.flatness.curvature import require_library
from amp_plugin.flatness.measures import (
    INTERVALS,
    MEASURES,
    Measures,
    MeasureSettings,
    measure,
    measures_table,
)
from amp_plugin.flatness.objective import Objective
from amp_plugin.flatness.pictures import plot_landscapes
from amp_plugin.text import in_markdown, tell, visible
from amp_plugin.train.results import Steps
from amp_plugin.train.run_folder import SavedRun, open_run
from amp_plugin.trainer.checkpoints import SaveError, check_writable

_PICTURES = {"line": "landscape_line.png", "plane": "landscape.png"}
# Runs that differ in one of these options would be measured on different data.
_DATA = (
    *("dataset", "dataset_config_name", "image_column", "text_column", "text_pair_column", "label_column"),
    *("train_split", "train_images", "validation_images", "image_size", "label_noise"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m amp_plugin.flatness", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=path, metavar="FOLDER", help="Output folders of finished runs.")
    add("--names", nargs="+", metavar="NAME", help="Names of the runs. Default: the folders' names.")
    add("--output_dir", default=Path("flatness"), type=path, help="Folder for the results. [flatness]")
    measures = f"Measures to make: {', '.join(MEASURES)}. [all]"
    add("--measures", nargs="+", metavar="MEASURE", choices=MEASURES, default=list(MEASURES), help=measures)
    count = number(int, "[1, inf)")
    add("--images", type=count, metavar="N", help="Training images (or texts) to measure on. Default: 500, or all.")
    add("--batch_size", type=count, default=250, help="Examples of a pass, which change the memory only. [250]")
    add("--data_root", type=path, help="Folder in the layout of the Hub to load the data from, instead of the Hub.")
    add("--dataset", help="Data set instead of the recorded one, where that was a folder.")
    add("--training_mode", action="store_true", help="BatchNorm uses the statistics of each batch, and dropout is on.")
    add(
        "--epsilon",
        type=number(float, INTERVALS["epsilon"]),
        help="Radius of the ball. Default: the first run's --amp_epsilon.",
    )
    add("--norm", choices=NORMS, help="Norm of the ball. Default: the first run's --amp_norm.")
    for field in fields(MeasureSettings):
        if text := field.metadata.get("help"):
            kind: Any = type(field.default)
            kind = number(kind, INTERVALS[field.name])
            add(f"--{field.name}", type=kind, default=field.default, help=f"{text} [{field.default}]")
    arguments: argparse.Namespace = parser.parse_args(argv)
    different(arguments.folders, "folders")
    different(arguments.names, "--names")
    if arguments.names is not None and len(arguments.names) != len(arguments.folders):
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
    out: Path = arguments.output_dir
    check_writable(out)
    runs = {}
    for name, folder in zip(arguments.names or _names(arguments.folders), arguments.folders, strict=True):
        runs[name] = open_run(folder, dataset=arguments.dataset, data_root=arguments.data_root)
    first = next(iter(runs.values()))
    for run in runs.values():
        _check_same_data(first, run)
    settings = _settings(arguments, first)
    examples = min(500, len(first.task.train)) if arguments.images is None else arguments.images
    batches = {name: run.training_batches(examples, arguments.batch_size) for name, run in runs.items()}
    where = f"{examples:,} training {first.task.train.split.kind} of {first.task.dataset}"
    steps, measured = Steps(), dict[str, Measures]()

    def save(name: str, text: str) -> None:
        steps.do(out / name, lambda: (out / name).write_text(text, encoding="utf-8"))

    def measure_run(name: str, run: SavedRun) -> Measures:
        objective = Objective(run.task.model, batches[name], training=arguments.training_mode)
        return measure(
            objective,
            settings,
            arguments.measures,
            lambda what, make: steps.do(f"{visible(name)}: the measure {what}", make),
        )

    try:
        for name, run in runs.items():
            tell(f"measuring {visible(name)}")
            if (found := steps.do(visible(name), partial(measure_run, name, run))) is not None:
                measured[name] = found
                record = {
                    "measured_on": where,
                    "training_mode": arguments.training_mode,
                    "settings": asdict(settings),
                    "models": {name: found.as_dict() for name, found in measured.items()},
                }
                save("flatness.json", json.dumps(record, allow_nan=False) + "\n")  # the next model may take hours
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {out / 'flatness.json'}" if measured else "") from None
    if measured:
        page = partial(_page, measured, runs, settings, where, training=arguments.training_mode)
        for old in _PICTURES.values():
            with contextlib.suppress(OSError):  # what cannot be removed cannot be drawn either, which is told
                (out / old).unlink()
        tell(f"{page(())}\nresults: {visible(str(out))}")
        save("flatness.md", page(()))
        if pictures := _draw(measured, out, where, steps):
            save("flatness.md", page(pictures))
    steps.end(out, "the other results")


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def _settings(arguments: argparse.Namespace, first: SavedRun) -> MeasureSettings:
    given = {f.name: getattr(arguments, f.name) for f in fields(MeasureSettings)}
    for name in ("epsilon", "norm"):
        if given[name] is None and (given := {**given, name: first.settings.get(f"amp_{name}")})[name] is None:
            raise ValueError(f"{str(first.folder)!r} does not record amp_{name}; give --{name}")
    return MeasureSettings(**given)


def _check_same_data(first: SavedRun, run: SavedRun) -> None:
    drawn = ("seed",) if first.settings.get("label_noise") else ()  # which the noise is drawn by
    differ = [name for name in (*_DATA, *drawn) if first.settings.get(name) != run.settings.get(name)]
    if differ:
        told = "; ".join(f"{n} {first.settings.get(n)!r} and {run.settings.get(n)!r}" for n in differ)
        raise ValueError(f"{first.folder} and {run.folder} were trained on different data, so not comparable: {told}")


def _draw(measured: Mapping[str, Measures], out: Path, where: str, steps: Steps) -> list[str]:
    """Draw the landscapes that all models have, and return the names of the pictures."""
    drawn = []
    for kind, how in (("line", "along a line"), ("plane", "in a plane")):
        scapes = {name: getattr(found, kind) for name, found in measured.items()}
        if all(scapes.values()):
            picture, title = out / _PICTURES[kind], f"Loss {how} through the weights:\n{where}"
            failures = len(steps.failures)
            steps.do(picture, partial(plot_landscapes, scapes, picture, title))
            if len(steps.failures) == failures:
                drawn.append(picture.name)
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
            n: f"{run.metrics['eval_error']:.2f}" for n, run in runs.items() if n in measured
        },
        "trained with": {n: in_markdown(run.settings.get("optim", "-")) for n, run in runs.items() if n in measured},
    }
    found = {
        name: next((value for m in measured.values() if (value := getattr(m, name)) is not None), None)
        for name in ("sharpness", "eigenvalues", "trace", "line", "plane")
    }
    notes = [f"Measured on {in_markdown(where)}, without augmentation, in {'training' if training else 'eval'} mode."]
    if found["sharpness"]:
        ball = "around every tensor" if settings.norm == "tensor" else "around all weights together"
        notes.append(
            f"Sharpness: the highest rise of the loss that {settings.steps} steps of projected gradient ascent find in"
            f" the ball of radius {settings.epsilon:g} {ball}."
        )
    if found["eigenvalues"] and found["trace"]:
        notes.append(
            f"Eigenvalues: Lanczos, {found['eigenvalues'].products} Hessian-vector products, ± residual. Trace:"
            f" Hutchinson, {found['trace'].probes} probes, ± standard error."
        )
    if found["line"] or found["plane"]:
        notes.append(
            f"Landscapes: random directions of seeds {settings.seed} and {settings.seed + 1}, filter-normalised, biases"
            " and norm layers fixed."
        )
    if found["sharpness"] or found["trace"]:
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
    except (ValueError, SaveError) as error:
        return f"error: {error}"
    except OSError as error:
        return f"error: {in_words(error)}"
    return None


if __name__ == "__main__":
    run_command(lambda: run(sys.argv[1:]), ())
