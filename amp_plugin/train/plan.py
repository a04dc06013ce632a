"""What a run would do and take, from the shapes alone: `train.py --dry_run`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils.data import BatchSampler
from torch.utils.flop_counter import FlopCounterMode

from amp_plugin import AMP
from amp_plugin.base import OptimizerFactory
from amp_plugin.hosts.checkpoints import last_checkpoint
from amp_plugin.train.options import DataArguments, ModelArguments, RecipeArguments
from amp_plugin.train.tasks import Task
from amp_plugin.train.trainer import RecipeTrainer


@dataclass(frozen=True)
class Counts:
    """How often a run does what.

    Attributes:
        steps: of the optimizer.
        steps_per_epoch: of the optimizer.
        passes_per_batch: forward and backward passes over a batch: the clean one and those AMP adds.
        passes: forward and backward passes of a process in the whole run.
        images: that go through them, with repetitions, in all processes.
    """

    steps: int
    steps_per_epoch: int
    passes_per_batch: int
    passes: int
    images: int


@dataclass(frozen=True)
class Costs:
    """What one process computes and holds, without the kernels' work space and the framework itself.

    Attributes:
        forward_flops: of one image; a multiply-add counts as two.
        training_flops: of one image's forward and backward pass.
        weights: bytes of parameters and buffers.
        gradients: bytes.
        optimizer_state: bytes of the base optimizer's state; None if it cannot be told without a real step.
        perturbation: bytes of AMP's copy of the weights.
        activations: bytes that autograd keeps for the backward pass of a batch, weights cast for it included.
    """

    forward_flops: int
    training_flops: int
    weights: int
    gradients: int
    optimizer_state: int | None
    perturbation: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes held when the backward pass at the perturbed weights begins."""
        return self.weights + self.gradients + (self.optimizer_state or 0) + self.perturbation + self.activations


def counts(args: RecipeArguments, images: int, passes_per_batch: int) -> Counts:
    """Count as the Trainer will.

    Args:
        args: of the run.
        images: to train on.
        passes_per_batch: 1 without AMP, else 1 + inner_iter.

    Raises:
        ValueError: there is not one whole batch.
    """
    sampler = BatchSampler(range(images), args.train_batch_size, args.dataloader_drop_last)
    batches = len(BatchSamplerShard(sampler, num_processes=args.world_size))
    if batches == 0:
        raise ValueError(f"{images} images do not make one batch of {args.train_batch_size} for every process")
    window = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(batches / window)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    epochs, rest = divmod(steps, steps_per_epoch)
    passes = (epochs * batches + min(rest * window, batches)) * passes_per_batch
    full = args.train_batch_size * args.world_size
    seen = epochs * min(images, batches * full) + min(rest * window * full, images)
    return Counts(steps, steps_per_epoch, passes_per_batch, passes, seen * passes_per_batch)


def costs(
    model: nn.Module, make_optimizer: OptimizerFactory, args: RecipeArguments, batch: Mapping[str, Tensor]
) -> Costs:
    """Run a training step on tensors that have shapes but no contents.

    Args:
        model: takes the batch and returns its loss; stays as it is.
        make_optimizer: called with its parameters.
        args: of the run.
        batch: tensors by name, with the examples along their first dimension; stays as it is.
    """
    size, device = len(batch["labels"]), args.device
    precision = torch.bfloat16 if args.bf16 else torch.float16
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode() as mode:
        # A copy for which these stand in place of the model's own tensors.
        fakes: dict[int, Any] = {id(b): mode.from_tensor(b).to(device) for b in model.buffers()}
        for p in model.parameters():
            fakes[id(p)] = nn.Parameter(mode.from_tensor(p).detach().to(device), p.requires_grad)
        twin = copy.deepcopy(model, fakes).train()
        optimizer = make_optimizer(twin.parameters())
        own = {t.untyped_storage()._cdata for t in (*twin.parameters(), *twin.buffers())}
        inputs = {name: mode.from_tensor(t).to(device) for name, t in batch.items()}
        with FlopCounterMode(display=False) as counter:
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast(device.type, precision, enabled=args.bf16 or args.fp16),
            ):
                loss = twin(**inputs).loss
            forward = counter.get_total_flops()
            loss.backward()
        state = _state_of(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    perturbs = isinstance(optimizer, AMP) and optimizer.perturbs
    return Costs(
        forward_flops=forward // size,
        training_flops=counter.get_total_flops() // size,
        weights=_bytes([*model.parameters(), *model.buffers()]),
        gradients=_bytes(trained) * (2 if args.world_size > 1 else 1),  # DDP's buckets beside them
        optimizer_state=state,
        perturbation=_bytes(trained) if perturbs else 0,
        activations=sum(s.nbytes() for key, s in kept.items() if key not in own),
    )


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
    perturbs = isinstance(optimizer, AMP) and optimizer.perturbs
    count = counts(args, len(task.train), 1 + (args.amp_inner_iter if perturbs else 0))
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
        f" {count.passes_per_batch} over each batch",
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


def _state_of(optimizer: Optimizer) -> int | None:
    base = optimizer.base_optimizer if isinstance(optimizer, AMP) else optimizer
    try:
        base.step()
    except Exception:  # of an optimizer that looks at its values, or needs a kernel for them
        return None
    return _bytes([v for state in base.state.values() for v in state.values() if isinstance(v, Tensor)])


def _optimizer(args: RecipeArguments, optimizer: Optimizer) -> str:
    settings = f" ({args.optim_args})" if args.optim_args else ""
    amp = "without AMP"
    if isinstance(optimizer, AMP):
        amp = f"AMP: epsilon {args.amp_epsilon}, inner_lr {args.amp_inner_lr}, inner_iter {args.amp_inner_iter},"
        amp += f" {args.amp_norm} ball{'' if optimizer.perturbs else '; which perturbs nothing'}"
    where = "all parameters" if args.decay_all_parameters else "all but BatchNorm and biases"
    decay = f"weight decay {args.weight_decay} on {where}"
    return f"{args.optim}{settings}; {amp}; {decay}; gradient clipped to {args.max_grad_norm}"


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
        "AMP's copy": f"{_mib(cost.perturbation)}, of the weights",
        "activations": f"{_mib(cost.activations)}, which autograd keeps of {args.train_batch_size} images{saved}",
        "not counted": "the kernels' work space, the framework, the images",
    }
    return rows if cost.perturbation else {k: v for k, v in rows.items() if k != "AMP's copy"}


def _results(args: RecipeArguments) -> str:
    folder = Path(str(args.output_dir))
    text = f"{folder}{', which exists: what is in it is overwritten' if folder.exists() else ''}; checkpoints:"
    text += f" {getattr(args.save_strategy, 'value', args.save_strategy)}"
    if args.checkpoint_to_resume():
        text += f"; would resume from {args.resume_from_checkpoint!r} (there: {last_checkpoint(folder) or 'none'})"
    return text


def _aligned(rows: Mapping[str, str]) -> str:
    left = max(map(len, rows))
    return "\n".join(f"{name:<{left}}  {value}" for name, value in rows.items())


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000 or unit == "E":
            break
        number /= 1000
    return f"{number:.3g} {unit}"
