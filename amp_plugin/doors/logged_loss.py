"""The loss that a Trainer's loop adds up for its log, without NaN and infinity, and without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils.import_utils import is_torch_xla_available


class FiniteLoss(Tensor):
    """A loss that is known to be finite, so that nobody has to ask the device, as the Trainer's loop would twice."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer the loop's question here; whatever else is computed is a plain tensor."""
        if func in (torch.isnan, torch.isinf):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def loss_for_log(trainer: Trainer, loss: Tensor) -> Tensor:
    """Return what the loop of a Trainer is to add to its sum of losses for this loss.

    With ``logging_nan_inf_filter`` the loop replaces a loss that is not finite by the mean of those before it. To find
    that out it waits for the device, in every step. The device makes the same choice here, with the same numbers.
    """
    total: Tensor | None = getattr(trainer, "_tr_loss", None)  # there is none outside the loop
    filters = trainer.is_in_train and trainer.args.logging_nan_inf_filter and not is_torch_xla_available()
    if not filters or total is None or total.device != loss.device:
        return loss
    steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
    return torch.where(loss.abs() < math.inf, loss, total / steps).as_subclass(FiniteLoss)
