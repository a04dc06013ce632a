"""`AMPTrainer`: `transformers.Trainer` with AMP, with checkpoints that survive a kill, and with publishing."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from amp_plugin.doors.trainer import AMPMixin
from amp_plugin.trainer.checkpoints import CheckpointMixin
from amp_plugin.trainer.described import optimizer_in_words, settings_in_words
from amp_plugin.trainer.evaluation import EvaluationMixin
from amp_plugin.trainer.publishing import PublishingMixin


class AMPTrainer(AMPMixin, CheckpointMixin, EvaluationMixin, PublishingMixin, Trainer):
    """`transformers.Trainer` with Adversarial Model Perturbation when ``args.optim`` asks for it.

    :class:`AMPMixin` makes the perturbations and logs what they did; the docstring there names what is logged.
    :class:`CheckpointMixin` keeps checkpoints complete whatever kills the process. :class:`EvaluationMixin` keeps the
    weights as they are where an evaluation is in half precision. :class:`PublishingMixin` makes sure, before a training
    begins, that ``push_to_hub`` will work after it. For a Trainer of another library, combine the mixins with that one.

    Raises:
        TypeError: The arguments are neither :class:`amp_plugin.AMPTrainingArguments` nor made of `AMPArguments`.
        ValueError: The host cannot run AMP exactly (DeepSpeed, FSDP1, XLA, optimizers that step inside backward);
            the message names what to use instead.
        HubError: ``push_to_hub`` is on, but the repository cannot be written to.
    """

    def training_for_card(self) -> dict[str, Any]:
        """Return what the model card says of AMP and of the other settings."""
        return {
            "optimizer": optimizer_in_words(vars(self.args)),
            "uses_amp": self.args.uses_amp,
            "settings": settings_in_words(self.args),
        }
