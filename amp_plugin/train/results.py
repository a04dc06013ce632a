"""Save what a finished training found: the weights first, and each thing whether or not another one fails."""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from transformers.trainer_utils import PredictionOutput

from amp_plugin.hub import HubError
from amp_plugin.provenance import run_record
from amp_plugin.report import append_to_ledger, table
from amp_plugin.text import tell
from amp_plugin.train.card import card_details
from amp_plugin.train.corrupted import corrupted_test
from amp_plugin.train.costs import passes_made
from amp_plugin.train.execution import execution
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments
from amp_plugin.train.run_folder import RECORD, RECORDS, draw_pictures, write_records
from amp_plugin.train.settings import settings_of
from amp_plugin.train.tasks import Task
from amp_plugin.train.trainer import RecipeTrainer
from amp_plugin.trainer.checkpoints import SaveError, explained, last_checkpoint
from amp_plugin.whole_file import write_json

T = TypeVar("T")
_LOGGED = ("loss", "amp_loss", "perturbed_loss", "sharpness", "clipped")
_MEBIBYTE = 2**20


class Steps:
    """Do one thing after another, and remember what failed."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.out_of_step = False  # this process may have left a communication that the other processes wait in

    def do(self, what: Path | str, step: Callable[[], T], *, without: str = "", together: bool = False) -> T | None:
        """Return what a step returns; None if it failed.

        Args:
            what: the file that the step writes; or words, if it writes none.
            step: what is to be done.
            without: what a failure means, for its message.
            together: the processes communicate within the step.
        """
        try:
            if isinstance(what, str):
                return step()
            with explained(what.name, what.parent):
                return step()
        except (SaveError, HubError) as error:  # one process writes or pushes, after the processes have communicated
            said = str(error)
        except Exception as error:  # whatever it is, the other results shall not be lost
            reason = str(error).strip() or "no reason given"
            said = f"{what} failed: {type(error).__name__}: {' '.join(reason.split())}"
            self.out_of_step |= together
        self.failures.append(f"{said}; {without}" if without else said)
        return None

    def in_all(self, processes: int) -> bool:
        """Tell every process whether the first one has met no failure."""
        fine = [not self.failures]
        if processes > 1:
            broadcast_object_list(fine)
        return fine[0]

    def end(self, folder: Path, others: str = "the other results of the training") -> None:
        """Raise a `SaveError` of one line for each failure, if there was any; tell where the `others` are."""
        if self.failures:
            rest = f"{others} are in {folder}"
            if last_checkpoint(folder) is not None:
                rest += "; when this is mended, the same command with --resume_from_checkpoint last makes all of them"
            raise SaveError("\nerror: ".join([*self.failures, rest]))


def save_results(
    trainer: RecipeTrainer,
    task: Task,
    parsed: tuple[DataArguments, ModelArguments, RecipeArguments],
    trained: Mapping[str, float],
    argv: list[str],
    compared: Mapping[str, Any] | None,
) -> Steps:
    """Save the weights, test them, record the run, draw its pictures, write its card and publish it.

    Args:
        trainer: the trainer, whose training has ended.
        task: data and model.
        parsed: the options.
        trained: metrics of the training.
        argv: the command's options, for the card.
        compared: record of the run that the card compares with, if any.

    Returns:
        The steps, which know what failed.
    """
    (data, model, args), steps = parsed, Steps()
    folder = Path(str(args.output_dir))
    where = "validation" if data.validation_images else "test"
    if trainer.is_world_process_zero():
        with contextlib.suppress(OSError):
            (folder / RECORD).unlink()  # an earlier run's, which is not of the weights that come now
    steps.failures += trainer.failures
    # A public call would push before there is a card.
    steps.do(folder / "model.safetensors", lambda: trainer.save_model(_internal_call=True), together=True)
    if steps.out_of_step and args.world_size > 1:
        return steps
    lacking = f"without it {folder} gets no {RECORD}, and no ledger a line"
    tested = steps.do(f"the final {where}", trainer.final_test, without=lacking, together=True)
    metrics = all_metrics(trainer, trained, tested)
    steps.do(folder / "trainer_state.json", trainer.save_state)
    whole = tested is not None
    if (images := task.to_corrupt) is not None and not (steps.out_of_step and args.world_size > 1):
        test = partial(corrupted_test, trainer, images)
        corrupted = steps.do(f"the {where} on corrupted images", test, without=lacking, together=True)
        whole &= corrupted is not None
        metrics |= corrupted or {}
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        steps.do(folder / RECORDS, lambda: write_records(folder / RECORDS, history))
        figures = folder / "all_results.json"
        steps.do(figures, lambda: write_metrics(figures, metrics))
        found = steps.do(
            "the record",
            lambda: run_record(settings_of(*parsed), metrics, execution(trainer, task.fingerprints)),
            without=f"{lacking}; nor is there a model card",
        )
        record = found or {}
        if whole and found:
            steps.do(folder / RECORD, lambda: write_record(folder / RECORD, record))
        if whole and found and args.ledger is not None:
            ledger, line = Path(args.ledger), f"the line to append is {folder / RECORD}"
            steps.do(ledger, lambda: append_to_ledger(ledger, record), without=line)
        steps.do("the table", lambda: report(metrics, where, folder))

        def write_card() -> None:
            trainer.card_details = card_details(argv, task, data, args, record=record, compared=compared)
            trainer.create_model_card()
            tell(f"model card: {folder / 'README.md'}")

        title = f"{model.name}, {args.optim} on {task.dataset}"
        draw_pictures(folder, title, history, tested, task.class_names(), where, steps.do)
        if found:
            steps.do(folder / "README.md", write_card)
    if args.push_to_hub and not (steps.out_of_step and args.world_size > 1):
        if steps.in_all(args.world_size):
            steps.do("the push", lambda: publish(trainer), together=True)
        elif steps.failures:
            command = f"python -m amp_plugin.hub {shlex.quote(str(folder))} {trainer.hub_model_id}"
            steps.failures.append(f"not published, as the folder is incomplete; this publishes it as it is: {command}")
    return steps


def all_metrics(
    trainer: RecipeTrainer, trained: Mapping[str, float], tested: PredictionOutput | None
) -> dict[str, float]:
    """Return the metrics of the training and of the test; those of a failed test are left out."""
    history, state = trainer.state.log_history, trainer.state
    metrics = {**trained, **((tested.metrics if tested else None) or {})}
    last = next((r for r in reversed(history) if "loss" in r), {})
    metrics.update({name: last[name] for name in _LOGGED if name in last})
    metrics.setdefault("loss", metrics["train_loss"])  # if none was logged, the whole run's mean stands in
    made = passes_made(trainer.optimizer, state.global_step, history)
    if errors := [r["eval_error"] for r in history if "eval_error" in r]:
        metrics["best_eval_error"] = min(errors)
    metrics["passes"] = float(state.epoch or 0.0) * trainer.args.passes_per_loss * made
    return metrics


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record whole or not at all: a run without a record is an unfinished run."""
    write_json(path, record)


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Write a run's metrics as the stock Trainer's `save_metrics` does, whole or not at all."""
    write_json(path, metrics, indent=4, sort_keys=True)


def publish(trainer: RecipeTrainer) -> None:
    """Push the folder, and print where it is."""
    pushed = trainer.push_to_hub()
    if isinstance(pushed, CommitInfo):  # only the first process has one
        tell(f"published: {pushed.repo_url}")


def report(metrics: Mapping[str, float], where: str, folder: Path) -> None:
    """Print the table of a run's metrics, and where the model is."""
    tested = {"error": "{:.2f} %", "nll": "{:.4f}", "ece": "{:.4f}"}
    rows = {
        "train loss": f"{metrics['loss']:.4f}",
        **{
            f"{images} {name if name == 'error' else name.upper()}": form.format(metrics[f"{prefix}_{name}"])
            for prefix, images in (("eval", where), ("corrupted", "corrupted"))
            for name, form in tested.items()
            if f"{prefix}_{name}" in metrics
        },
        "sharpness": f"{metrics['sharpness']:.4f}" if "sharpness" in metrics else "- (none logged)",
        "time": f"{metrics['seconds']:.0f} s",
    }
    tell(f"{table(rows)}\nmodel: {folder}")


def check_room(folder: Path, model: torch.nn.Module, *, checkpoints: bool) -> None:
    """Raise a `SaveError` if the disk has no room for the weights, or for a checkpoint if there are to be any.

    A checkpoint holds the weights and, with most optimizers, two more numbers for each.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    needed, free = (3 if checkpoints else 1) * weights, shutil.disk_usage(folder).free
    if free < needed:
        what = "a checkpoint" if checkpoints else "the weights"
        raise SaveError(
            f"the disk of {str(folder)!r} has {free / _MEBIBYTE:,.0f} MiB free, and {what} of this model takes about"
            f" {math.ceil(needed / _MEBIBYTE):,} MiB; make room, or choose another output_dir"
        )
