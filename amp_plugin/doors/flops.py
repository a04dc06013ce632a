"""The Trainer's count of floating-point operations, kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer


class CountedFlops:
    """Counts that the Trainer has made, by what they depend on: it looks at all parameters of the model for each.

    They are counted anew after each log, in which the Trainer stores their sum, and where the optimizer has got other
    parameters.
    """

    def __init__(self) -> None:
        self._counts: dict[Any, int] = {}

    def clear(self) -> None:
        """Forget the counts."""
        self._counts = {}

    def count(self, trainer: Any, count: Callable[[Any], Any], inputs: Any) -> int:
        """Return the count for a batch.

        Args:
            trainer: Trainer whose model is trained.
            count: the `floating_point_ops` that the Trainer inherits; another one than transformers' is always asked.
            inputs: batch of the step.
        """
        name = getattr(trainer.model, "main_input_name", "input_ids")
        batch = inputs.get(name) if isinstance(inputs, Mapping) else None
        if getattr(count, "__func__", None) is not Trainer.floating_point_ops or not isinstance(batch, Tensor):
            return int(count(inputs))
        trained = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
        key = id(trainer.model), batch.numel(), trained
        if key not in self._counts:
            self._counts[key] = int(count(inputs))
        return self._counts[key]
