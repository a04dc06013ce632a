"""Describe what a run would do and take: `train.py --dry_run`."""

from __future__ import annotations

import shutil
import textwrap
from functools import partial
from pathlib import Path

from torch.optim import Optimizer
from tqdm import tqdm

from amp_plugin import AMP
from amp_plugin.text import visible
from amp_plugin.train.corrupted import TESTS
from amp_plugin.train.costs import Costs, costs, counts
from amp_plugin.train.identity import RESULTS, checkpoint_to_continue
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments
from amp_plugin.train.tasks import Task
from amp_plugin.train.trainer import RecipeTrainer
from amp_plugin.trainer.checkpoints import last_checkpoint
from amp_plugin.trainer.described import amp_in_words, methods_in_words, schedule_in_words


def plan(data_args: DataArguments, model_args: ModelArguments, args: RecipeArguments, task: Task) -> str:
    """Describe a run in two columns, names and values, as wide as the terminal."""
    model, examples = task.model, task.train.split.kind
    kind, kwargs = RecipeTrainer.get_optimizer_cls_and_kwargs(args, model)
    make_optimizer = partial(kind, **kwargs)
    optimizer = make_optimizer(model.parameters())
    count = counts(args, len(task.train), optimizer, args.passes_per_loss)
    batch = task.train.__getitems__(range(min(args.train_batch_size, len(task.train))))
    cost = costs(model, make_optimizer, args, batch)
    each = " in each process" if args.world_size > 1 else ""
    at_most = "at most " if isinstance(optimizer, AMP) and not optimizer.policy.is_deterministic else ""
    augmentation = ""
    if "pixel_values" in batch:
        height, width = batch["pixel_values"].shape[-2:]
        sizes, augmentation = f"{width} x {height}", f"; augmentation: {data_args.augmentation}"
    else:
        sizes = f"{batch['input_ids'].shape[1]} tokens in the longest of the first batch"
    corrupted = "" if task.to_corrupt is None else f" and {len(task.to_corrupt):,} of them corrupted, {TESTS} times"
    milestones = args.lr_milestones if args.lr_scheduler_type == "steps" else []
    drops = ", at step " * bool(milestones) + " and ".join(f"{round(m * count.steps):,}" for m in milestones)
    factors = {"batches": args.gradient_accumulation_steps, "processes": args.world_size}
    step = " x ".join([f"{args.train_batch_size} images", *(f"{n} {name}" for name, n in factors.items() if n > 1)])
    rows = {
        "data": f"{task.dataset}: {task.examples_to_train()}, {len(task.test):,} to"
        f" {'validate' if data_args.validation_images else 'test'}{corrupted}, {sizes},"
        f" {len(task.class_names())} classes{augmentation}",
        "model": model_args.name
        + (f" {model_args.model_kwargs or '{}'}" if model_args.pretrained is None else "")
        + f": {model.num_parameters():,} parameters{task.origin()}",
        "optimizer": _optimizer(args, optimizer),
        "schedule": f"learning rate {args.learning_rate}, {schedule_in_words(args)}{drops}",
        "steps": f"{count.steps:,}, {count.steps_per_epoch:,} an epoch, each of {step}",
        "passes": f"{count.passes:,} forward and backward{each}, {at_most}{count.passes_per_batch:g} over each batch",
        "FLOPs": f"of one of the {examples}: {_si(cost.forward_flops)} forward, {_si(cost.training_flops)} forward and"
        f" backward; the training: {_si(count.images * cost.training_flops)} (a multiply-add counts as two)",
        "memory": f"at least {_mib(cost.peak)}{each}, estimated:",
        **_memory(cost, args),
        "device": f"{args.device}{f', {args.arithmetic()}' if args.arithmetic() else ''}; seed {args.seed}",
        "results": _results(args),
    }
    left = max(map(len, rows)) + 2
    width = max(shutil.get_terminal_size((120, 24)).columns, left + 40)
    indent = " " * left
    folded = (
        textwrap.fill(visible(v), width, initial_indent=n.ljust(left), subsequent_indent=indent)
        for n, v in rows.items()
    )
    return "\n".join(["Dry run: nothing is trained or written.", *folded])


def _optimizer(args: RecipeArguments, optimizer: Optimizer) -> str:
    settings = f" ({args.optim_args})" if args.optim_args else ""
    amp = "without AMP"
    if args.uses_amp and isinstance(optimizer, AMP):
        amp = amp_in_words(args) + ("" if optimizer.perturbs else "; which perturbs nothing")
    where = "all parameters" if args.decay_all_parameters else "all but BatchNorm and biases"
    decay = f"weight decay {args.weight_decay} on {where}"
    methods = "".join(f"; {name}: {words}" for name, words in methods_in_words(vars(args)).items())
    return f"{args.optim}{settings}; {amp}{methods}; {decay}; gradient clipped to {args.max_grad_norm}"


def _memory(cost: Costs, args: RecipeArguments) -> dict[str, str]:
    state = "unknown for this optimizer" if cost.optimizer_state is None else _mib(cost.optimizer_state)
    saved = "; less with the recomputation asked for" if args.gradient_checkpointing else ""
    copies = f"{_mib(cost.perturbation)}, of the weights that are perturbed"
    return {
        "  weights": _mib(cost.weights),
        "  gradients": _mib(cost.gradients) + (", with DDP's buckets" if args.world_size > 1 else ""),
        "  optimizer state": state,
        **({"  copies": copies} if cost.perturbation else {}),
        "  activations": f"{_mib(cost.activations)}, which autograd keeps of {args.train_batch_size} images{saved}",
        "  not counted": "the kernels' work space, the framework, the images",
    }


def _results(args: RecipeArguments) -> str:
    folder = Path(str(args.output_dir))
    text = f"{folder}{_what_is_there(folder, going_on=checkpoint_to_continue(args) is not None)}; checkpoints:"
    text += f" {getattr(args.save_strategy, 'value', args.save_strategy)}"
    text += "" if args.save_minutes is None else f", every {args.save_minutes:g} minutes"
    text += "" if args.minutes is None else f", and before a stop within {args.minutes:g} minutes"
    if args.checkpoint_to_resume():
        text += f"; would resume from {args.resume_from_checkpoint!r} (there: {last_checkpoint(folder) or 'none'})"
    return text


def _what_is_there(folder: Path, *, going_on: bool) -> str:
    """Tell what a run that is not refused does with a folder."""
    if not folder.exists():
        return ""
    if not any((folder / name).exists() for name in RESULTS):
        return ", which exists: what is in it stays"
    of = "this run so far" if going_on else "an earlier run"
    return f", which has the results of {of}: they are replaced, and all else in it stays"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _si(number: float) -> str:
    return str(tqdm.format_sizeof(number))
