"""Give `AMPTrainer` the paper's schedule, the baselines and a final test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from amp_plugin import AMPTrainer
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.train.method_options import MethodArguments
from amp_plugin.train.options import RecipeArguments

_NOT_OF_AMP = {"amp_loss": "perturbed_loss", "amp_passes": "passes"}


class ObjectiveTrainer(Trainer):
    """Give the stock Trainer the training losses of `MethodArguments`; AMP above it perturbs for any of them.

    The losses hold in training mode alone: an evaluation reports the plain cross-entropy, without label smoothing too.
    The logged ``loss`` is the smoothed, mixed or adversarial loss; with flooding it is the plain one, not the flooded.
    """

    args: MethodArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.mixup_alpha is not None:
            self.model_accepts_loss_kwargs = False  # the loss is not the model's, but the mean computed here
        self._losses: list[Tensor] = []  # one for each micro-batch of the accumulation window

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the stock loss; in training of the adversarial batch, if one is asked for, at the current weights."""
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
        """Begin a window of micro-batches as the stock Trainer does."""
        self._losses = []
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Make the stock step; with a flood level, find the gradient of ``|L - b| + b`` for the window's loss L.

        That gradient is the gradient of L, with its sign turned round where L is below the level b. So accumulation and
        several processes make no difference. The loss that is returned is not flooded, to be comparable. Source: Ishida
        et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?", ICML 2020,
        https://arxiv.org/abs/2002.08709.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.flood_level is not None:
            self._losses.append(loss.detach())
            if len(self._losses) == self.current_gradient_accumulation_steps:
                mean: Any = self.accelerator.reduce(sum(self._losses), "mean")
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, torch.sign(mean - self.args.flood_level))
                self._losses = []
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the stock Trainer does; a baseline has its own names for ``amp_loss`` and ``amp_passes``."""
        if self.args.baseline is not None:
            logs = {_NOT_OF_AMP.get(name, name): value for name, value in logs.items()}
        super().log(logs, start_time)

    def _training_loss(self, model: nn.Module, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        labels = inputs.get("labels")
        if labels is None or not labels.is_floating_point():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs["logits"], labels, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def _attacked(self, inputs: Any, num_items_in_batch: Any) -> dict[str, Any]:
        """Return the batch with ``images + epsilon * sign(gradient)``, no farther than black and white.

        These are the worst images nearby, to first order. The pass that finds the gradient leaves no trace. Source:
        Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015,
        https://arxiv.org/abs/1412.6572, section 4.
        """
        model: Any = self.model  # not the model in DDP: the gradient of the images is each process's own
        settings: Any = self.train_dataset.settings  # type: ignore[union-attr]
        images = inputs["pixel_values"].detach().requires_grad_()
        passes = ExtraPasses(model)
        with passes.clean():
            pass  # the pass that follows draws the same dropout masks
        with passes.perturbed():
            loss = self._training_loss(model, {**inputs, "pixel_values": images}, False, num_items_in_batch)
            if self.accelerator.scaler is not None:
                loss = self.accelerator.scaler.scale(loss)  # a small gradient would be 0 in fp16
            (gradient,) = torch.autograd.grad(loss, images)
        with passes.perturbed():
            pass
        # The images are normalised, and epsilon is of pixels scaled to [0, 1].
        centre, scale = (images.new_tensor(list(v)).view(-1, 1, 1) for v in (settings.mean, settings.std))
        moved = images.detach() + (self.args.adversarial_epsilon or 0.0) / scale * gradient.sign()
        return {**inputs, "pixel_values": torch.clamp(moved, (0.0 - centre) / scale, (1.0 - centre) / scale)}


class RecipeTrainer(AMPTrainer, ObjectiveTrainer):
    """Train as `AMPTrainer` does, with the paper's step schedule, and with the baselines."""

    args: RecipeArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card_details: dict[str, Any] = {}  # what the Trainer does not know
        self.failures: list[str] = []  # of the training, that cost no result but are told with those of the results
        super().__init__(*args, **kwargs)
        if self.args.baseline is not None:
            self._check_host()

    def create_accelerator_and_postprocess(self) -> None:
        """Create accelerate's part as the stock Trainer does; let pinned batches go to the GPU while the host goes on.

        The arguments keep the stock value, because copies that nobody waits for change no result.
        """
        super().create_accelerator_and_postprocess()
        pinned = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        self.accelerator.dataloader_config.non_blocking |= pinned

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Double the stock count where there is an attack."""
        return self.args.passes_per_loss * super().floating_point_ops(inputs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Choose as `AMPTrainer` does, or take the baseline that ``args.optim`` asks for, around SGD."""
        if args.baseline is None:
            return AMPTrainer.get_optimizer_cls_and_kwargs(args, model)
        base, kwargs = AMPTrainer.get_optimizer_cls_and_kwargs(args.base_arguments(), model)
        return args.baseline, {
            **kwargs,
            **args.optimizer_kwargs(),
            "base_optimizer": base,
            "capturable": args.captures,
        }

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Multiply the learning rate by `lr_gamma` at each of `lr_milestones`, unless a stock schedule is named."""
        if self.args.lr_scheduler_type != "steps":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            scheduled: Any = self.optimizer if optimizer is None else optimizer
            milestones = [round(fraction * num_training_steps) for fraction in self.args.lr_milestones]
            scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(scheduled, milestones, self.args.lr_gamma)
            self.lr_scheduler = scheduler
        return self.lr_scheduler

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse the weights of another network, which the stock Trainer mixes with the initial ones and warns."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if differ := [key for key in (*load_result.missing_keys, *load_result.unexpected_keys) if key not in tied]:
            raise ValueError(f"its weights are of another network, {differ[0]} is in one of them alone")

    def _load_best_model(self) -> None:
        """Load the best checkpoint as `AMPTrainer` does; the last weights are kept where that fails."""
        best = str(self.state.best_model_checkpoint)
        try:
            if not Path(best).is_dir() and not (Path(str(self.args.output_dir)) / Path(best).name).is_dir():
                raise FileNotFoundError("there is no such folder")
            super()._load_best_model()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failures.append(f"could not load the best model, {best!r}: {reason}; the results are the last step's")

    def training_for_card(self) -> dict[str, Any]:
        """Return what the model card says of the training, with `card_details`."""
        return {**super().training_for_card(), **self.card_details}

    def final_test(self) -> PredictionOutput:
        """Return predictions, labels and metrics (``eval_...``) of the evaluation data at the final weights.

        The metrics are logged, unless the last evaluation of the training already logged them.
        """
        tested = self.predict(self.eval_dataset, metric_key_prefix="eval")  # type: ignore[arg-type]
        logged = {r["step"] for r in self.state.log_history if "eval_error" in r}
        if self.state.global_step not in logged:
            self.log(dict(tested.metrics or {}))
        return tested
