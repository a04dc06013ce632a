"""The main job: train an image classifier, test it, save it and report."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import amp_plugin.train
from amp_plugin.data import DatasetError, ImageBatches, ImageData, collate, load_images
from amp_plugin.data.callback import EpochCallback
from amp_plugin.hosts.checkpoints import SaveError, explained, require_writable
from amp_plugin.hosts.classifier import image_classifier
from amp_plugin.metrics import compute_metrics
from amp_plugin.report import append_to_ledger, plot_curves, table
from amp_plugin.train.options import DataArguments, parse, settings_of
from amp_plugin.train.plan import plan
from amp_plugin.train.progress import EpochLine
from amp_plugin.train.trainer import RecipeTrainer


def load(args: DataArguments) -> tuple[ImageData, Any, Any]:
    """The data set, and the images to train and to report on."""
    data = load_images(
        args.dataset,
        data_root=args.data_root,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column,
        train_split=args.train_split,
        test_split=args.test_split,
        image_size=args.image_size,
    )
    train, test = data.train, data.test
    if args.validation_images is not None:
        train, test = train.split(args.validation_images)
    if args.train_images is not None:
        train = train.subset(args.train_images)
    return data, train, test


def set_cpu_threads(requested: int | None) -> int:
    """Use the cores: accelerate launch allows a process one thread unless it is told otherwise."""
    if requested is not None:
        torch.set_num_threads(requested)
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()


def main(argv: list[str]) -> None:
    """Train, test, save and report."""
    data_args, model_args, args = parse(argv, amp_plugin.train.__doc__)
    folder = Path(str(args.output_dir))
    if not args.dry_run:
        require_writable(folder)
    threads = set_cpu_threads(args.cpu_threads)
    set_seed(args.seed)
    with args.main_process_first(desc="decoding the images"):
        data, train, test = load(data_args)
    height, width = train.images.shape[1:3]
    model = image_classifier(
        model_args.model,
        data.class_names,
        mean=data.settings.mean,
        std=data.settings.std,
        image_size=(height, width),
        **model_args.parsed_model_kwargs(),
    )
    if args.dry_run:
        if args.process_index == 0:
            print(plan(data_args, model_args, args, data, (len(train), len(test)), model))
        return
    if args.channels_last:
        torch.nn.Module.to(model, memory_format=torch.channels_last)  # transformers hides the signature
    batches = partial(ImageBatches, settings=data.settings, channels_last=args.channels_last)
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=batches(train, augment=data_args.augmentation, seed=args.seed),
        eval_dataset=batches(test, augment="none"),
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=[EpochCallback()],
    )
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    trainer.add_callback(EpochLine())
    if trainer.is_world_process_zero():
        where = f"cpu, {threads} thread(s)" if args.device.type == "cpu" else str(args.device)
        where += f", {args.arithmetic()}" if args.arithmetic() else ""
        described = f"AMP, epsilon {args.amp_epsilon}, inner_lr {args.amp_inner_lr}, {args.amp_norm} ball"
        print(
            f"{model_args.model} with {sum(p.numel() for p in model.parameters()):,} parameters on {data.name}:"
            f" {len(train):,} images to train, {len(test):,} to test; {args.optim}"
            f"{f' ({described})' if args.uses_amp else ' (without AMP)'}; on {where}; results in"
            f" {args.output_dir}",
            flush=True,
        )
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=args.checkpoint_to_resume())
    seconds = time.perf_counter() - start
    metrics = {**result.metrics, **trainer.evaluate()}
    last = next((r for r in reversed(trainer.state.log_history) if "loss" in r), {})
    metrics.update({name: last[name] for name in ("loss", "amp_loss", "sharpness", "clipped") if name in last})
    metrics.setdefault("loss", metrics["train_loss"])  # the mean of the whole run, if none was logged
    metrics["seconds"] = seconds
    with explained("the results", folder):
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("all", metrics)
        if trainer.is_world_process_zero():
            if args.ledger is not None:
                append_to_ledger(Path(args.ledger), settings_of(data_args, model_args, args), metrics)
            where = "validation" if data_args.validation_images else "test"
            report(metrics, where, folder, trainer.state.log_history, f"{model_args.model}, {args.optim}")


def report(metrics: dict[str, float], where: str, folder: Path, records: list[dict[str, Any]], title: str) -> None:
    """Print the table and draw the curves."""
    rows = {
        "train loss": f"{metrics['loss']:.4f}",
        f"{where} error": f"{metrics['eval_error']:.2f} %",
        f"{where} NLL": f"{metrics['eval_nll']:.4f}",
        f"{where} ECE": f"{metrics['eval_ece']:.4f}",
        "sharpness": f"{metrics['sharpness']:.4f}" if "sharpness" in metrics else "- (no AMP)",
        "time": f"{metrics['seconds']:.0f} s",
    }
    print(table(rows))
    print(f"model: {folder}")
    try:
        plot_curves(records, folder / "curves.png", title)
    except ImportError:
        print('no curves drawn: matplotlib is missing (pip install "amp-plugin[plots]")')
    else:
        print(f"curves: {folder / 'curves.png'}")


def run(argv: list[str]) -> None:
    """`main`; what the user can mend ends the process with one line instead of a traceback."""
    try:
        main(argv)
    except SaveError as error:  # in every process alike: the first one tells, before a launcher ends it with the others
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)
            sys.exit(1)
        sys.exit(f"\nerror: {error}")  # on a line of its own, below the bar
    except (DatasetError, ValueError) as error:
        sys.exit(f"error: {error}")
