"""What a run would do and take, to be read: `train.py --dry_run`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from amp_plugin import AMP
from amp_plugin.train.costs import Costs, Counts, costs, counts
from amp_plugin.train.described import methods_in_words
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments
from amp_plugin.train.tasks import Task
from amp_plugin.train.trainer import RecipeTrainer
from amp_plugin.trainer.checkpoints import last_checkpoint


def plan(
    data_args: DataArguments,
    model_args: ModelArguments,
    args: RecipeArguments,
    task: Task,
) -> str:
    """The whole of it, to be read.

    Args:
        data_args: of the run.
        model_args: of the run.
        args: of the run.
        task: the model and its examples.

    Raises:
        ValueError: the run could not start.
    """
    model, examples = task.model, task.train.split.kind
    kind, kwargs = RecipeTrainer.get_optimizer_cls_and_kwargs(args, model)
    make_optimizer = partial(kind, **kwargs)
    optimizer = make_optimizer(model.parameters())
    count = counts(args, len(task.train), optimizer, args.passes_per_loss)
    batch = task.train.__getitems__(range(min(args.train_batch_size, len(task.train))))
    cost = costs(model, make_optimizer, args, batch)
    total = count.images * cost.training_flops
    rows = {
        "data": f"{task.dataset}: {len(task.train):,} {examples} to train, {len(task.test):,} to"
        f" {'validate' if data_args.validation_images else 'test'}, {_shapes(batch)}, {len(task.class_names())} classes"
        + (f"; augmentation: {data_args.augmentation}" if "pixel_values" in batch else ""),
        "model": f"{model_args.name}{_arguments(model_args)}: {_parameters(model):,} parameters{task.origin()}",
        "optimizer": _optimizer(args, optimizer),
        "schedule": _schedule(args, count),
        "steps": f"{count.steps:,}, {count.steps_per_epoch:,} an epoch, each of {_batch(args)}",
        "passes": f"{count.passes:,} forward and backward{' in each process' if args.world_size > 1 else ''},"
        f" {_at_most(optimizer)}{count.passes_per_batch:g} over each batch",
        "FLOPs": f"of one of the {examples}: {_si(cost.forward_flops)} forward, {_si(cost.training_flops)} forward and"
        f" backward; the training: {_si(total)} (a multiply-add counts as two)",
        "memory": f"at least {_mib(cost.peak)}{' in each process' if args.world_size > 1 else ''}, estimated:",
        **{f"  {name}": value for name, value in _memory(cost, args).items()},
        "device": f"{args.device}{f', {args.arithmetic()}' if args.arithmetic() else ''}; seed {args.seed}",
        "results": _results(args),
    }
    return "Dry run: nothing is trained or written.\n" + _aligned(rows)


def _shapes(batch: Mapping[str, Tensor]) -> str:
    """Of one example as the model gets it."""
    if "pixel_values" in batch:
        height, width = batch["pixel_values"].shape[-2:]
        return f"{width} x {height}"
    return f"{batch['input_ids'].shape[1]} tokens in the longest of the first batch"


def _arguments(model_args: ModelArguments) -> str:
    return f" {model_args.model_kwargs or '{}'}" if model_args.pretrained is None else ""


def _optimizer(args: RecipeArguments, optimizer: Optimizer) -> str:
    settings = f" ({args.optim_args})" if args.optim_args else ""
    amp = "without AMP"
    if args.uses_amp and isinstance(optimizer, AMP):
        amp = f"AMP: epsilon {args.amp_epsilon}, inner_lr {args.amp_inner_lr}, inner_iter {args.amp_inner_iter},"
        amp += f" {args.amp_norm} ball{'' if args.amp_parameters is None else f' for {args.amp_parameters!r}'}"
        amp += f"{'' if args.amp_ascent == 'full' else f', ascent {args.amp_ascent}'}"
        amp += "" if optimizer.perturbs else "; which perturbs nothing"
    where = "all parameters" if args.decay_all_parameters else "all but BatchNorm and biases"
    decay = f"weight decay {args.weight_decay} on {where}"
    methods = "".join(f"; {name}: {words}" for name, words in methods_in_words(vars(args)).items())
    return f"{args.optim}{settings}; {amp}{methods}; {decay}; gradient clipped to {args.max_grad_norm}"


def _at_most(optimizer: Optimizer) -> str:
    return "" if not isinstance(optimizer, AMP) or optimizer.policy.is_deterministic else "at most "


def _schedule(args: RecipeArguments, count: Counts) -> str:
    if args.lr_scheduler_type != "steps":
        warmup = f", warmup {args.warmup_steps}" if args.warmup_steps else ""
        return f"learning rate {args.learning_rate}, {getattr(args.lr_scheduler_type, 'value', 'other')}{warmup}"
    drops = " and ".join(f"{round(fraction * count.steps):,}" for fraction in args.lr_milestones)
    return f"learning rate {args.learning_rate}, times {args.lr_gamma} at step {drops}"


def _batch(args: RecipeArguments) -> str:
    factors = {
        "images": args.train_batch_size,
        "batches": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }
    shown = [f"{n} {name}" for name, n in factors.items() if n > 1 or name == "images"]
    return " x ".join(shown)


def _memory(cost: Costs, args: RecipeArguments) -> dict[str, str]:
    state = "unknown for this optimizer" if cost.optimizer_state is None else _mib(cost.optimizer_state)
    saved = "; less with the recomputation asked for" if args.gradient_checkpointing else ""
    rows = {
        "weights": _mib(cost.weights),
        "gradients": _mib(cost.gradients) + (", with DDP's buckets" if args.world_size > 1 else ""),
        "optimizer state": state,
        "copies": f"{_mib(cost.perturbation)}, of the weights that are perturbed",
        "activations": f"{_mib(cost.activations)}, which autograd keeps of {args.train_batch_size} images{saved}",
        "not counted": "the kernels' work space, the framework, the images",
    }
    return rows if cost.perturbation else {k: v for k, v in rows.items() if k != "copies"}


def _results(args: RecipeArguments) -> str:
    folder = Path(str(args.output_dir))
    text = f"{folder}{', which exists: what is in it is overwritten' if folder.exists() else ''}; checkpoints:"
    text += f" {getattr(args.save_strategy, 'value', args.save_strategy)}"
    if args.checkpoint_to_resume():
        text += f"; would resume from {args.resume_from_checkpoint!r} (there: {last_checkpoint(folder) or 'none'})"
    return text


def _aligned(rows: Mapping[str, str]) -> str:
    """Names and values in two columns, as wide as the terminal."""
    left = max(map(len, rows)) + 2
    width = max(shutil.get_terminal_size((120, 24)).columns, left + 40)
    folded = (
        textwrap.fill(value, width, initial_indent=name.ljust(left), subsequent_indent=" " * left)
        for name, value in rows.items()
    )
    return "\n".join(folded)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000 or unit == "E":
            break
        number /= 1000
    return f"{number:.3g} {unit}"
