"""A callback for the stock `transformers.Trainer` that attaches an AMP optimizer to the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from amp_plugin.attach import Attachment, attach
from amp_plugin.optimizer import find_amp

logger = logging.get_logger(__name__)


class AttachCallback(TrainerCallback):
    """Attaches the model for the time of the training, if the optimizer is AMP; among the defaults of every Trainer."""

    def __init__(self) -> None:
        self._attachment: Attachment | None = None
        self._check: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach; the losses of a pass must be means, or AMP's step, which is not normalised, has the wrong length."""
        self._detach()  # a training that failed had no end
        amp = find_amp(optimizer)
        if amp is None or amp.attached or model is None:
            return
        scope = args.gradient_accumulation_steps
        if args.average_tokens_across_devices:
            scope *= args.world_size
        if scope > 1:
            self._check = model.register_forward_pre_hook(_refuse_loss_over_window, with_kwargs=True)
        self._attachment = attach(amp, model)
        logger.warning(
            f"Training with Adversarial Model Perturbation, attached to {type(model).__name__}; each micro-batch is"
            " perturbed for itself. amp_plugin.AMPTrainer perturbs for the whole accumulation window, and logs more."
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._detach()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        if self._check is not None:
            self._check.remove()
        self._attachment = self._check = None


def _refuse_loss_over_window(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if model.training and kwargs.get("num_items_in_batch") is not None:
        raise ValueError(
            "the stock Trainer divides this model's loss by the number of items in the whole accumulation window (or"
            " over all devices), so AMP's ascent, which is not normalised, would be too short. Use"
            " amp_plugin.AMPTrainer, which is exact; or gradient_accumulation_steps=1 and"
            " average_tokens_across_devices=False"
        )
