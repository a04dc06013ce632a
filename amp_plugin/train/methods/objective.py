"""Losses that are not the model's own: label smoothing, mixup's, adversarial training's, flooding's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from amp_plugin.core.replay import ExtraPasses
from amp_plugin.train.method_options import MethodArguments
from amp_plugin.train.methods.adversarial import fast_gradient_sign

_NOT_OF_AMP = {"amp_loss": "perturbed_loss", "amp_passes": "passes"}


class ObjectiveTrainer(Trainer):
    """The stock Trainer with the training losses of `MethodArguments`; AMP above it perturbs for any of them.

    They hold in training mode alone: an evaluation reports the plain cross-entropy, without label smoothing too.
    The logged ``loss`` is the smoothed, mixed or adversarial one; with flooding the plain one, not the flooded.
    """

    args: MethodArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.mixup_alpha is not None:
            self.model_accepts_loss_kwargs = False  # its loss is not the model's, but the mean computed here
        self._passes_made = 0  # over the accumulation window's micro-batches, since it began
        self._window_loss: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stock loss; in training, of the adversarial batch if one is asked for, at the weights as they are."""
        if model.training:
            if self.args.adversarial_epsilon is not None:
                inputs = self._attacked(inputs, num_items_in_batch)
            return self._training_loss(model, inputs, return_outputs, num_items_in_batch)
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The stock window."""
        self._passes_made, self._window_loss = 0, None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The stock step; with a flood level, the gradient of ``|L - b| + b`` for the loss L of the whole window.

        That gradient is the one of L, with its sign turned round where L is below the level b. So accumulation and
        several processes make no difference. Source: Ishida et al., "Do We Need Zero Training Loss After Achieving Zero
        Training Error?", ICML 2020, https://arxiv.org/abs/2002.08709.

        Returns:
            The loss, not the flooded one: it stays comparable.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.flood_level is not None:
            self._window_loss = loss.detach() if self._window_loss is None else self._window_loss + loss.detach()
            self._passes_made += 1
            if self._passes_made == self.current_gradient_accumulation_steps:
                mean: Any = self.accelerator.reduce(self._window_loss, "mean")
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, torch.sign(mean - self.args.flood_level))
                self._passes_made, self._window_loss = 0, None
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The stock count, twice with an attack."""
        return self.args.passes_per_loss * int(super().floating_point_ops(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log; what AMPTrainer calls ``amp_loss`` and ``amp_passes`` has other names for a rival."""
        if self.args.rival is not None:
            logs = {_NOT_OF_AMP.get(name, name): value for name, value in logs.items()}
        super().log(logs, start_time)

    def _training_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> Any:
        labels = inputs.get("labels")
        if labels is None or not labels.is_floating_point():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs["logits"], labels, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def _attacked(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> dict[str, Any]:
        """The batch with the worst images nearby. Makes a pass that leaves no trace but those."""
        model: Any = self.model  # not DDP's: the gradient of the images is each process's own
        settings: Any = self.train_dataset.settings  # type: ignore[union-attr]
        scaler = self.accelerator.scaler

        def loss_of(images: Tensor) -> Tensor:
            loss: Tensor = self._training_loss(model, {**inputs, "pixel_values": images}, False, num_items_in_batch)
            return loss if scaler is None else scaler.scale(loss)  # or a small gradient would be 0 in fp16

        passes = ExtraPasses(model)
        with passes.clean():
            pass  # the pass that follows draws the same dropout masks
        with passes.perturbed():
            images = fast_gradient_sign(
                loss_of,
                inputs["pixel_values"],
                epsilon=self.args.adversarial_epsilon or 0.0,
                mean=settings.mean,
                std=settings.std,
            )
        with passes.perturbed():
            pass
        return {**inputs, "pixel_values": images}
