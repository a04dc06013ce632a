"""Write the card of a trained model: what it is, how good it is, how it was made and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from amp_plugin.provenance import commit, versions
from amp_plugin.text import in_address, in_cell, in_code, in_fence, in_markdown

PLACEHOLDER = "OWNER/NAME"  # stands for the repository until there is one
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# A metric has a name in the metadata, a name in a table and a format; as in `metrics`, the error is in percent.
_METRICS = {
    "accuracy": ("Accuracy", "accuracy", "{:.4f}"),
    "error": ("Error (%)", "error (%)", "{:.2f}"),
    "nll": ("Negative log-likelihood (nats)", "NLL (nats)", "{:.4f}"),
    "ece": ("Expected calibration error", "ECE", "{:.4f}"),
}
_CAPTIONS = {
    "curves": "Training curves",
    "confusion": "Confusion matrix",
    "reliability": "Reliability diagram",
    "landscape": "Loss landscape",
}

# The template's own functions: a text becomes Markdown.
_WRITERS: Any = {f.__name__: f for f in (in_address, in_cell, in_code, in_fence, in_markdown)}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Describe the data that a model was trained and tested on.

    Attributes:
        name: name for readers, e.g. ``CIFAR-10``.
        id: id of the data set, on the Hub if the data set is there.
        on_hub: whether the data set is on the Hub.
        config: configuration of the data set.
        split: split that the results are of.
        described: number of images and the like, after the name.
        note: sentence on what results on these data mean, in Markdown.
    """

    name: str
    id: str
    on_hub: bool = True
    config: str | None = None
    split: str = "test"
    described: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Describe a model and the training that made it for a card, which leaves out what is not given.

    Attributes:
        name: title of the card.
        architecture: timm's name, or the class of a transformers model.
        library: library that opens the model: timm (then transformers does too), transformers or peft; None if none.
        repo_id: repository on the Hub, filled in when the folder is pushed.
        task: task as the Hub calls it.
        parameters: number of parameters.
        data: data that the model was trained and tested on.
        metrics: metrics of the test by name, as `amp_plugin.metrics` gives them, or any others.
        optimizer: one phrase, e.g. "SGD".
        uses_amp: whether the model was trained with AMP.
        from_scratch: whether the first weights were random; None if that is not known.
        base_model: model on the Hub that was fine-tuned.
        settings: settings of the training, by name, both in Markdown.
        command: command that trains the model again.
        corrupted: metrics of the test on corrupted images, by the name of the corruption.
        corrupted_note: sentence on these images, in Markdown.
        compared: metrics of another run, by that run's name.
        compared_note: sentence on what else differs in that run, in Markdown.
        pictures: file names in the repository.
        license: licence as the Hub calls it.
        language: language of the data.
        tags: further tags.
        metadata: further fields of the card's metadata.
    """

    name: str
    architecture: str
    library: str | None = None
    repo_id: str = PLACEHOLDER
    task: str | None = "image-classification"
    parameters: int | None = None
    data: RunData | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    optimizer: str | None = None
    uses_amp: bool = False
    from_scratch: bool | None = None
    base_model: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    corrupted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    corrupted_note: str = ""
    compared: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    compared_note: str = ""
    pictures: Sequence[str] = ()
    license: str | None = None
    language: str | None = None
    tags: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_plugin(self) -> bool:
        """Tell whether the architecture is this package's, which must be imported before the model is opened."""
        known = self.library == "timm" and timm.is_model(self.architecture)
        return known and timm.model_entrypoint(self.architecture).__module__.startswith("amp_plugin.")


def model_card(run: Run) -> ModelCard:
    """Write the card of a run, with metadata that the Hub accepts: model-index, data set, library, licence, tags."""
    card: ModelCard = ModelCard.from_template(
        _metadata(run),
        template_path=str(_TEMPLATE),
        run=run,
        results=_results(run),
        corrupted=_table({in_markdown(name): metrics for name, metrics in run.corrupted.items()}),
        pictures=[captioned(name) for name in run.pictures],
        **_WRITERS,
        versions=versions(),
        commit=commit(),
    )
    return card


def pictures_in(folder: Path) -> list[str]:
    """List the names of the pictures in a run's folder, the training curves first."""
    names = (path.name for path in folder.glob("*.png") if not path.name.startswith("_"))
    return sorted(names, key=lambda name: (name != "curves.png", name))


def with_later_pictures(card: str, folder: Path) -> str:
    """Add to a card the pictures that came into the folder later, such as a loss landscape, below its own."""
    lines = card.split("\n")
    shown = [i for i, line in enumerate(lines) if line.startswith("![")]
    later = [name for name in pictures_in(folder) if f"]({in_address(name)})" not in card]
    if shown:
        end = shown[-1] + 3  # a caption follows
        lines[end:end] = [f"\n{captioned(name)}" for name in later]
    return "\n".join(lines)


def captioned(picture: str) -> str:
    """Return Markdown that shows a picture with its caption."""
    said = in_markdown(caption(picture))
    return f"![{said}]({in_address(picture)})\n\n*{said}.*"


def caption(picture: str) -> str:
    """Return what to write below a picture."""
    stem = Path(picture).stem
    return _CAPTIONS.get(stem, stem.replace("_", " ").replace("-", " ").capitalize())


def _metadata(run: Run) -> ModelCardData:
    libraries = ["timm", "transformers"] if run.library == "timm" else [run.library] if run.library else []
    amp = ["adversarial-model-perturbation"] if run.uses_amp else []
    return ModelCardData(
        model_name=run.name,
        library_name=run.library,
        pipeline_tag=run.task,
        license=run.license,
        language=run.language,
        base_model=run.base_model,
        datasets=[run.data.id] if run.data and run.data.on_hub else None,
        metrics=[name for name in run.metrics if name == "accuracy"] or None,  # the Hub knows no other of ours
        eval_results=_eval_results(run) or None,
        tags=[*([run.task] if run.task else []), *libraries, *amp, "amp_plugin", *run.tags],
        **run.metadata,
    )


def _eval_results(run: Run) -> list[EvalResult]:
    if run.data is None or run.task is None:
        return []
    return [
        EvalResult(
            task_type=run.task,
            task_name=run.task.replace("-", " ").capitalize(),
            dataset_type=run.data.id,
            dataset_name=run.data.name,
            dataset_config=run.data.config,
            dataset_split=run.data.split,
            metric_type=key,
            metric_name=_METRICS[key][0] if key in _METRICS else key,
            metric_value=float(f"{value:.6g}"),
        )
        for key, value in run.metrics.items()
    ]


def _results(run: Run) -> list[list[str]]:
    """Return a table: its heading, this run, and those it is compared with."""
    if not run.metrics:
        return []
    rows = {f"**this model{f' ({in_markdown(run.optimizer)})' if run.optimizer else ''}**": run.metrics}
    return _table(rows | {in_markdown(name): metrics for name, metrics in run.compared.items()})


def _table(rows: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return a heading, and a line for each label, in Markdown; the first label has all metrics that are shown."""
    if not rows:
        return []
    shown = next(iter(rows.values()))
    formats = {key: _METRICS.get(key, (key, key.replace("_", " "), "{:.4g}")) for key in shown}
    table = [["", *(in_markdown(name) for _, name, _ in formats.values())]]
    for label, row in rows.items():
        table.append([label, *(form.format(row[key]) if key in row else "" for key, (_, _, form) in formats.items())])
    return table
