"""Host microseconds of a training step with the arithmetic taken out, which is what a small network's GPU waits for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from benchmarks.rows import Row
from benchmarks.step import Batch, architecture, closure, loop, plain, problem, trainer_loop
from benchmarks.turns import Ways, compare

CASE = "PreActResNet18 without its passes"


class _Gradients(torch.autograd.Function):
    """Gives each parameter a gradient, without a computation."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *params: Tensor) -> Tensor:
        ctx.params = params
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *torch._foreach_add(ctx.params, 1.0)


def hollow() -> tuple[nn.Module, Batch]:
    """Return a network with all layers of a PreActResNet18, tiny ones, whose passes compute nothing; and a batch."""
    model, (images, labels) = problem({"width": 1}, 1)
    network, logits = architecture(model), torch.zeros(1, 10, device=images.device)
    params = list(network.parameters())
    network.forward = lambda *args, **kwargs: _Gradients.apply(logits, *params)
    return model, (images, labels)


WAYS: Ways = {
    "SGD": (partial(loop, make=hollow, way=plain), None),
    "AMP, closure": (partial(loop, make=hollow, way=closure), "SGD"),
    "AMP, attach": (partial(loop, make=hollow, way=plain, amp=True), "SGD"),
    "Trainer, SGD": (partial(trainer_loop, make=hollow, optim="sgd", trainer=Trainer), None),
    "AMPTrainer": (partial(trainer_loop, make=hollow, optim="amp"), "Trainer, SGD"),
}


def times(seconds: float) -> list[Row]:
    """Compare what the host does in a step, in all ways to train."""
    return compare("Host", CASE, WAYS, "µs", seconds=seconds, rounds=(20, 400), warm_up=20)
