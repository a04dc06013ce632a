"""Whether a loss is divided by the Trainer's `num_items_in_batch`, found out by computing the loss twice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from amp_plugin.core.replay import ExtraPasses


def uses_num_items(trainer: Trainer, inputs: dict[str, Any], num_items: Tensor | int) -> bool | None:
    """Whether `trainer.compute_loss` changes when `num_items_in_batch` is doubled.

    The stock Trainer takes every model whose forward has ``**kwargs`` for one that divides the sum of its losses by
    `num_items_in_batch`. Hundreds of heads do not divide, e.g. those of BERT for masked language modelling and of T5
    (https://github.com/huggingface/transformers/issues/47688): their loss, and so AMP's ascent, comes out k times
    too large with k accumulation steps and n times with n processes.

    The answer costs two forward passes, which leave no trace in the running statistics and the random numbers. All
    processes must ask together, and get the same answer.

    Args:
        trainer: Trainer with its model in place.
        inputs: micro-batch with labels.
        num_items: number of targets in the accumulation window.

    Returns:
        Whether the loss is divided; None if that makes no difference, because the window is one micro-batch on one
        device, or if these inputs cannot tell, because their loss is 0 or not finite (they hold no target).
    """
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return True
    args = trainer.args
    if args.gradient_accumulation_steps * args.world_size * max(args.n_gpu, 1) == 1:
        return None
    model: Any = trainer.model
    passes = ExtraPasses(model)
    losses = []
    with passes.clean():
        pass  # remembers where the random numbers start
    for n in (num_items, 2 * num_items):
        with passes.perturbed():
            loss: Any = trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=n)
            losses.append(loss.detach().float().sum())
    with passes.perturbed():
        pass  # puts the random numbers back to where they started
    once, twice = trainer.accelerator.reduce(torch.stack(losses), "sum").tolist()
    if once == 0.0 or not math.isfinite(once):
        return None
    return not math.isclose(once, twice, rel_tol=1e-3)
