"""Run the main job: train a classifier, test it, save it and report."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

import amp_plugin.train
from amp_plugin.command import run_command
from amp_plugin.data import DatasetError, collate
from amp_plugin.data.callback import EpochCallback
from amp_plugin.hub import HubError
from amp_plugin.metrics import compute_metrics
from amp_plugin.report.ledger import check_ledger
from amp_plugin.suggest import did_you_mean
from amp_plugin.text import tell, visible
from amp_plugin.train.cadence import Cadence, clock, interruption, stop_line
from amp_plugin.train.card import compared_run
from amp_plugin.train.command_line import CommandLine
from amp_plugin.train.corrupted import TESTS
from amp_plugin.train.defaults import keep_freed_memory
from amp_plugin.train.folder_lock import sole_writer
from amp_plugin.train.identity import (
    RunSettings,
    check_checkpoint,
    check_data,
    check_new_run,
    checkpoint_to_continue,
    remove_results,
)
from amp_plugin.train.optimizer_arguments import check_optimizer
from amp_plugin.train.options import TYPES, parse, with_recipe
from amp_plugin.train.places import check_places
from amp_plugin.train.plan import plan
from amp_plugin.train.progress import EpochLine
from amp_plugin.train.results import check_room, save_results
from amp_plugin.train.run_folder import RECORDS, RecordsFile, write_config
from amp_plugin.train.settings import settings_of
from amp_plugin.train.stock_options import check_precision
from amp_plugin.train.tasks import check_batch_of_one, make_task
from amp_plugin.train.trainer import RecipeTrainer
from amp_plugin.train.unused_options import without_effect
from amp_plugin.trainer.checkpoints import SaveError, check_writable, explained
from amp_plugin.trainer.described import amp_in_words, methods_in_words


def set_cpu_threads(requested: int | None) -> int:
    """Set the threads of this process, and return their number; accelerate launch would allow a process one thread."""
    if requested is not None:
        torch.set_num_threads(requested)
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()


def check_trackers(names: Iterable[str]) -> None:
    """Raise a ValueError if a tracker in ``report_to`` is unknown or not installed, before anything takes its time."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = did_you_mean(name, INTEGRATION_TO_CALLBACK).removeprefix(", ")
            hint = near or f"there are {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise ValueError(f"tracker {name!r} is unknown; {hint}?")
        if name not in installed:
            package = '"amp-plugin[tensorboard]"' if name == "tensorboard" else name.replace("_", "-")
            raise ValueError(f"--report_to {name}: {name} is not installed (pip install {package})")


def main(argv: list[str]) -> None:
    """Train, test, save and report."""
    with contextlib.ExitStack() as held:
        _main(argv, held)


def _main(argv: list[str], held: contextlib.ExitStack) -> None:
    begun, given = clock(), argv
    argv = with_recipe(argv)  # the card's command needs the recipe's options, and the file may be gone by then
    data_args, model_args, args = parse(argv, amp_plugin.train.__doc__)
    folder = Path(str(args.output_dir))
    settings = settings_of(data_args, model_args, args)
    compared = None if args.compare_with is None else compared_run(args.compare_with, settings)
    check_trackers(args.report_to)
    check_optimizer(args)
    check_precision(args)
    if args.dry_run:
        check_places(folder, None if args.ledger is None else Path(args.ledger))
    else:
        check_writable(folder)
        if args.ledger is not None:
            check_ledger(Path(args.ledger))
        if args.process_index == 0:
            held.enter_context(sole_writer(folder))
    notes = without_effect(CommandLine(TYPES).changed(argv), args)
    if (checkpoint := checkpoint_to_continue(args)) is None:
        check_new_run(settings, data_args, model_args, args)
    else:
        notes += check_checkpoint(checkpoint, settings, args)
    if notes and args.process_index == 0:
        tell("\n".join(f"note: {note}" for note in notes))
    threads = set_cpu_threads(args.cpu_threads)
    set_seed(args.seed)
    if args.fast and args.device.type == "cpu":
        keep_freed_memory()
    elif args.fast:
        torch.backends.cudnn.benchmark = True  # the shapes of a training do not change
    task = make_task(data_args, model_args, args)
    model = task.model
    if checkpoint is not None:
        check_data(checkpoint, task.fingerprints, task.dataset)
    check_batch_of_one(task, args)
    if args.dry_run:
        if args.process_index == 0:
            tell(plan(data_args, model_args, args, task))
        return
    check_room(folder, model, checkpoints=args.save_strategy != "no")
    corrupted = 0 if task.to_corrupt is None else TESTS * len(task.to_corrupt)
    cadence = Cadence(args, begun, len(task.test) / len(task.train), corrupted / len(task.test))
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.test,
        processing_class=task.processor,
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=[
            EpochCallback(),
            cadence,
            RunSettings(settings, task.fingerprints),
            RecordsFile(folder / RECORDS),
        ],
    )
    disable_progress_bar()  # transformers shows one for every file that it writes
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    shown = EpochLine()
    trainer.add_callback(shown)
    if trainer.is_world_process_zero():
        with explained("the results", folder):
            remove_results(folder)
        write_config(folder / "config.yaml", data_args, model_args, args)
        where = f"cpu, {threads} thread(s)" if args.device.type == "cpu" else str(args.device)
        where += f", {args.arithmetic()}" if args.arithmetic() else ""
        methods = "".join(f", {name}: {words}" for name, words in methods_in_words(vars(args)).items())
        tell(
            f"{visible(model_args.name)} with {model.num_parameters():,} parameters{task.origin()} on"
            f" {visible(task.dataset)}: {task.examples_to_train()}, {len(task.test):,} to test,"
            f" {len(task.class_names()):,} classes; {args.optim}"
            f" ({amp_in_words(args) if args.uses_amp else 'without AMP'}){methods}; on {where}; results in"
            f" {visible(str(args.output_dir))}"
        )
    start = time.perf_counter()
    try:
        result = trainer.train(resume_from_checkpoint=args.checkpoint_to_resume())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(interruption(args, given, trainer.state.global_step)) from None
    seconds = time.perf_counter() - start
    if cadence.stopped:
        if trainer.is_world_process_zero():
            tell(stop_line(args, given, trainer.state.global_step, trainer.state.max_steps))
        _leave(trainer)
        return
    trained = {**result.metrics, "seconds": seconds}
    if shown.first_step:
        trained["resumed_at_step"] = shown.first_step  # the seconds count from there
    try:
        steps = save_results(trainer, task, (data_args, model_args, args), trained, argv, compared)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the training was over; what is saved of it is in {folder}") from None
    if not (steps.out_of_step and args.world_size > 1):
        _leave(trainer)
    steps.end(folder)


def _leave(trainer: RecipeTrainer) -> None:
    # The processes leave together: one whose group outlives it, or that leaves the group alone, is aborted now and then
    # ("terminate called without an active exception"), and torchrun then calls the whole job failed.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def run(argv: list[str]) -> None:
    """Run `main`; an error that the user can mend ends the process with one line instead of a traceback."""

    def job() -> None:
        try:
            main(argv)
        except SaveError as error:
            sys.exit(f"\nerror: {error}")  # the bar has left its line unfinished

    run_command(job, (DatasetError, HubError, ValueError))
