"""Settle and check those options of the stock Trainer that this job has its own words for, or cannot follow."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch._inductor import list_mode_options
from transformers import SchedulerType
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy

from amp_plugin.suggest import did_you_mean

# Whether more is better, for each number that an evaluation gives; `amp_plugin.metrics` says what they are.
METRICS = {"accuracy": True, "error": False, "nll": False, "ece": False, "loss": False}
_CHOICES: dict[str, Any] = {
    "eval_strategy": IntervalStrategy,
    "hub_strategy": HubStrategy,
    "logging_strategy": IntervalStrategy,
    "lr_scheduler_type": SchedulerType,
    "save_strategy": SaveStrategy,
}
_FURTHER = {"lr_scheduler_type": ["steps"]}


def settle_choices(args: Any) -> None:
    """Check the options that are one of a few words, and take false, which is what YAML makes of ``no``, for "no"."""
    for name, kind in _CHOICES.items():
        value = str(getattr(getattr(args, name), "value", getattr(args, name)))
        words = [*_FURTHER.get(name, []), *(member.value for member in kind)]
        if value.lower() == "false" and "no" in words:
            value = "no"
            setattr(args, name, value)
        if value not in words:
            # The text of transformers is kept: its users search for it.
            raise ValueError(
                f"--{name}: {value} is not a valid {kind.__name__}{did_you_mean(value, words)}; choose one of"
                f" {', '.join(words)}"
            )


def settle_best_metric(args: Any) -> None:
    """Check `metric_for_best_model`, and let `greater_is_better` say whether more of it is better.

    The stock default is that more of everything but a loss is better.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    name = metric.removeprefix("eval_")
    if name not in METRICS:
        raise ValueError(
            f"--metric_for_best_model {metric!r} is not measured{did_you_mean(name, METRICS)}; choose one of"
            f" {', '.join(METRICS)}"
        )
    if args.greater_is_better is None:
        args.greater_is_better = METRICS[name]
    elif args.greater_is_better != METRICS[name]:
        better = "more" if METRICS[name] else "less"
        raise ValueError(
            f"--greater_is_better {args.greater_is_better} would keep the worst model: {better} is better of"
            f" --metric_for_best_model {metric}; leave --greater_is_better out"
        )


def check_compilation(args: Any) -> None:
    """Check the words that torch.compile takes, which it would look at in the first step alone."""
    if args.torch_compile_backend is not None:
        known = {backend.value.lower() for backend in DynamoBackend} & set(torch.compiler.list_backends(()))
        check_word("torch_compile_backend", args.torch_compile_backend.lower(), sorted(known))
    if args.torch_compile_mode is not None:
        check_word("torch_compile_mode", args.torch_compile_mode, list(list_mode_options()))


def check_word(option: str, word: str, words: Collection[str]) -> None:
    """Raise a ValueError unless a word is one of those that an option takes."""
    if word not in words:
        raise ValueError(f"--{option} {word!r} is unknown{did_you_mean(word, words)}; choose one of {', '.join(words)}")


def check_stock_options(args: Any, *, texts: bool) -> None:
    """Raise a ValueError for an option of the stock Trainer with which this job would fail, or report nothing."""
    batching = args.accelerator_config
    check_compilation(args)
    refused = {
        "--output_dir is empty; name a folder, or leave it out for one below runs": args.output_dir == "",
        "--prediction_loss_only leaves nothing to report: error, NLL and ECE need the predictions; leave it out": (
            args.prediction_loss_only
        ),
        "--label_names: the labels are called labels here; leave it out": args.label_names not in (None, ["labels"]),
        "--remove_unused_columns: the batches have no columns but what the model takes; leave it out": (
            args.remove_unused_columns
        ),
        "--neftune_noise_alpha is noise on the embeddings of texts, and there is no --text_column; leave it out": (
            args.neftune_noise_alpha is not None and not texts
        ),
        "--batch_eval_metrics: ECE is no mean of batches, so it is computed of all predictions; leave it out": (
            args.batch_eval_metrics
        ),
        "--eval_do_concat_batches false: the metrics are computed of all predictions at once; leave it out": (
            not args.eval_do_concat_batches
        ),
        "--include_for_metrics: the metrics are computed of predictions and labels alone; leave it out": (
            bool(args.include_for_metrics)
        ),
        "--auto_find_batch_size: where memory runs out it begins again with a smaller batch than the settings of the"
        " run tell, from weights that have moved; leave it out, and choose a --per_device_train_batch_size that fits"
        " (--dry_run tells the memory)": args.auto_find_batch_size,
        "--use_liger_kernel: there are such kernels for language models that generate only; leave it out": (
            args.use_liger_kernel
        ),
        "--train_sampling_strategy: the examples are drawn at random, in whole batches; leave it out": (
            args.train_sampling_strategy != "random"
        ),
        "--accelerator_config split_batches: --per_device_train_batch_size is of each process here; leave it out": (
            batching.split_batches
        ),
        "--accelerator_config dispatch_batches: each process reads its own batches here; leave it out": (
            bool(batching.dispatch_batches)
        ),
        "--dataloader_persistent_workers needs --dataloader_num_workers above 0": (
            args.dataloader_persistent_workers and args.dataloader_num_workers == 0
        ),
        "--dataloader_prefetch_factor needs --dataloader_num_workers above 0": (
            args.dataloader_prefetch_factor is not None and args.dataloader_num_workers == 0
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(reason)


def check_precision(args: Any) -> None:
    """Refuse a precision that the device does not compute in, or that an evaluation would fail with."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "fp16 (--fp16, or --mixed_precision of accelerate launch): on a CPU accelerate would compute in float32 and"
            " call it fp16; use bf16, or leave it out"
        )
    if args.bf16 and args.fp16_full_eval:
        raise ValueError("--fp16_full_eval does not go with --bf16; use --bf16_full_eval, or leave it out")


def check_whole_batches(args: Any, train: int, test: int) -> None:
    """Refuse `dataloader_drop_last` where it would leave no training batch, or test examples out of the result."""
    if not args.dataloader_drop_last:
        return
    step, tested = args.train_batch_size * args.world_size, args.eval_batch_size * args.world_size
    if train < step:
        raise ValueError(
            f"--dataloader_drop_last leaves no batch: {train} examples to train on are fewer than the {step} of a batch"
            " of all processes; leave it out, or lower --per_device_train_batch_size"
        )
    if test % tested:
        raise ValueError(
            f"--dataloader_drop_last would leave {test % tested} of {test} examples out of the test; leave it out, or"
            f" choose a --per_device_eval_batch_size of which {test} is a multiple"
        )
