"""Count what a run computes, as the Trainer will, and measure what it holds on tensors without contents."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils.data import BatchSampler
from torch.utils.flop_counter import FlopCounterMode

from amp_plugin import AMP
from amp_plugin.core.base_optimizer import OptimizerFactory
from amp_plugin.core.find import find_amp
from amp_plugin.train.options import RecipeArguments


@dataclass(frozen=True)
class Counts:
    """Count how often a run does what; a pass is forward and backward."""

    steps: int
    steps_per_epoch: int
    passes_per_batch: float  # on the mean, with the passes that AMP adds
    passes: int  # of a process in the whole run; a part of a batch counts as that part
    images: int  # in these passes, with repetitions, in all processes


@dataclass(frozen=True)
class Costs:
    """Hold what one process computes, in FLOPs, and holds, in bytes.

    A multiply-add counts as two FLOPs. The kernels' work space and the framework itself are left out.
    """

    forward_flops: int  # of one image
    training_flops: int  # of one image, forward and backward
    weights: int  # with buffers
    gradients: int  # with DDP's buckets
    optimizer_state: int | None  # of the base optimizer; None if only a real step can tell
    perturbation: int  # copies of the weights that AMP or a baseline perturbs
    activations: int  # kept by autograd for the backward pass of a batch, with the weights cast for it

    @property
    def peak(self) -> int:
        """Return the bytes held when the backward pass at the perturbed weights begins."""
        return self.weights + self.gradients + (self.optimizer_state or 0) + self.perturbation + self.activations


def mean_passes(optimizer: Any, steps: int) -> float:
    """Count the mean passes over a batch in a training of so many steps; the most, if AMP decides on the way."""
    amp = find_amp(optimizer)
    if amp is None or not amp.perturbs:
        return 1
    policy = amp.policy
    ascents = sum(policy.ascends({**policy.state, "ascent_step": step}, steps) for step in range(steps))
    return 1 + (amp.inner_iter - policy.spares_descent) * policy.cost * ascents / steps


def passes_made(optimizer: Any, steps: int, records: Iterable[Mapping[str, float]]) -> float:
    """Count the mean passes over a batch in a training that is over; the Trainer's records tell what AMP decided."""
    amp = find_amp(optimizer)
    logged = [(0.0, 0.0), *((r["step"], r["amp_passes"]) for r in records if "amp_passes" in r)]
    last, _ = logged[-1]
    if amp is None or amp.policy.is_deterministic or not last:
        return mean_passes(optimizer, steps)
    return sum(passes * (step - before) for (before, _), (step, passes) in itertools.pairwise(logged)) / last


def counts(args: RecipeArguments, images: int, optimizer: Any, passes_per_loss: int = 1) -> Counts:
    """Count steps, passes and images as the Trainer will; a loss and its gradient take `passes_per_loss` passes."""
    sampler = BatchSampler(range(images), args.train_batch_size, args.dataloader_drop_last)
    batches = len(BatchSamplerShard(sampler, num_processes=args.world_size))
    if batches == 0:
        raise ValueError(f"{images} images do not make one batch of {args.train_batch_size} for every process")
    window = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(batches / window)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    epochs, rest = divmod(steps, steps_per_epoch)
    passes_per_batch = passes_per_loss * mean_passes(optimizer, steps)
    passes = round((epochs * batches + min(rest * window, batches)) * passes_per_batch)
    full = args.train_batch_size * args.world_size
    seen = epochs * min(images, batches * full) + min(rest * window * full, images)
    return Counts(steps, steps_per_epoch, passes_per_batch, passes, round(seen * passes_per_batch))


def costs(
    model: nn.Module, make_optimizer: OptimizerFactory, args: RecipeArguments, batch: Mapping[str, Tensor]
) -> Costs:
    """Run a training step on tensors that have shapes but no contents; `model` and `batch` stay as they are.

    The model takes the batch, tensors by name with the examples along their first dimension, and returns its loss.
    """
    size, device = len(batch["labels"]), args.device
    precision = torch.bfloat16 if args.bf16 else torch.float16
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode() as mode:
        # The copy of the model has these tensors in place of its own.
        fakes: dict[int, Any] = {id(b): mode.from_tensor(b).to(device) for b in model.buffers()}
        for p in model.parameters():
            fakes[id(p)] = nn.Parameter(mode.from_tensor(p).detach().to(device), p.requires_grad)
        twin = copy.deepcopy(model, fakes).train()
        optimizer = make_optimizer(twin.parameters())
        if isinstance(optimizer, AMP):
            optimizer.name_parameters(twin)
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
    trained, copies = [p for p in model.parameters() if p.requires_grad], 0
    if isinstance(optimizer, AMP) and optimizer.perturbs:
        ball = [p for group in optimizer.param_groups for p in optimizer.selection.of(group) if p.requires_grad]
        copies = _bytes(ball) * (1 + optimizer.policy.copies)
    return Costs(
        forward_flops=forward // size,
        training_flops=counter.get_total_flops() // size,
        weights=_bytes([*model.parameters(), *model.buffers()]),
        gradients=_bytes(trained) * (2 if args.world_size > 1 else 1),  # DDP has buckets beside them
        optimizer_state=state,
        perturbation=copies,
        activations=sum(s.nbytes() for key, s in kept.items() if key not in own),
    )


def _state_of(optimizer: Optimizer) -> int | None:
    base = optimizer.base_optimizer if isinstance(optimizer, AMP) else optimizer
    try:
        base.step()
    except Exception:  # an optimizer may look at its values, or need a kernel for them
        return None
    return _bytes([v for state in base.state.values() for v in state.values() if isinstance(v, Tensor)])


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
