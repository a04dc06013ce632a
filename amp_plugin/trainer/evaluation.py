"""An evaluation in half precision that leaves the trained weights as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class EvaluationMixin:
    """An ``evaluation_loop`` of any `transformers.Trainer` that keeps the weights in their precision.

    With ``bf16_full_eval`` or ``fp16_full_eval`` the stock Trainer converts the model in place when it evaluates after
    a training, so that what is saved or pushed then has lost half of its digits. Here the weights come back.
    """

    args: Any
    model: Any
    is_in_train: bool

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the stock Trainer does; the arguments and what is returned are its own."""
        evaluate: Any = super().evaluation_loop  # type: ignore[misc]
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            return evaluate(*args, **kwargs)
        with _precision_kept(self.model):
            return evaluate(*args, **kwargs)


@contextmanager
def _precision_kept(model: nn.Module) -> Iterator[None]:
    """Give a model the values of its parameters and its buffers back, on the device on which they are then."""
    values = [(p, p.data) for p in model.parameters()]
    buffers = [(module, *named) for module in model.modules() for named in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for p, value in values:
            p.data = value.to(p.device)
        for module, name, buffer in buffers:  # a conversion makes other tensors of buffers
            setattr(module, name, buffer.to(getattr(module, name).device))
