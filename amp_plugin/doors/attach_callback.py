"""A callback for the stock `transformers.Trainer` that attaches an AMP optimizer to the model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from amp_plugin.core.find import find_amp
from amp_plugin.core.optimizer import AMP
from amp_plugin.doors.attach import attach, attachments
from amp_plugin.doors.attachment import Attachment

logger = logging.get_logger(__name__)

_made_here: weakref.WeakSet[Attachment] = weakref.WeakSet()  # attachments that the callback made


class AttachCallback(TrainerCallback):
    """Attaches the model while it is trained, if the optimizer is AMP; every Trainer has this callback by default."""

    def __init__(self) -> None:
        self._attachment: Attachment | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach the model, and refuse losses over a whole window: AMP's ascent, not normalised, would be too short."""
        if model is None:
            return
        amp = find_amp(optimizer)
        release(model, amp)
        if amp is None or amp.attached:
            return
        scope = args.gradient_accumulation_steps
        if args.average_tokens_across_devices:
            scope *= args.world_size
        amp.total_steps = state.max_steps
        self._attachment = attach(amp, model)
        _made_here.add(self._attachment)
        if scope > 1:
            check = model.register_forward_pre_hook(_check_loss_share, with_kwargs=True)
            self._attachment.handles.append(check)
        logger.warning(
            f"Training with Adversarial Model Perturbation, attached to {type(model).__name__}; each micro-batch is"
            " perturbed for itself. amp_plugin.AMPTrainer perturbs for the whole accumulation window, and logs more."
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the model."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None


def release(model: nn.Module, amp: AMP | None = None) -> None:
    """Detach a model that a Trainer attached and, because its training failed, did not detach.

    Args:
        model: model that is about to be trained.
        amp: optimizer that will train it; default None, an optimizer other than AMP.

    Raises:
        ValueError: Somebody else attached the model, and to another optimizer than `amp`.
    """
    for attachment in list(attachments(model)):
        if attachment in _made_here:
            attachment.detach()
        elif attachment.amp is not amp:
            raise ValueError(
                "the model is attached to an AMP optimizer, but it is another one that trains it; call"
                " amp_plugin.detach(model) first"
            )


def _check_loss_share(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if model.training and kwargs.get("num_items_in_batch") is not None:
        raise ValueError(
            "the stock Trainer divides this model's loss by the number of items in the whole accumulation window (or"
            " over all devices), so AMP's ascent, which is not normalised, would be too short. Use"
            " amp_plugin.AMPTrainer, which is exact; or gradient_accumulation_steps=1 and"
            " average_tokens_across_devices=False"
        )
