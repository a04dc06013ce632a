"""`AMPMixin`: AMP for any `transformers.Trainer`, exact over the gradient accumulation window.

The Trainer's loop fetches a whole accumulation window at once (`get_batch_samples`). At the window's first micro-batch,
all micro-batches are run at theta, which gives the ascent gradient, and the weights are perturbed. The loop's own steps
then run at theta + delta, and after the last one the weights are theta again, before clipping and the optimizer's step.
So k accumulation steps equal one batch that is k times larger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from amp_plugin.core.complaints import tell_of_skipped_step
from amp_plugin.core.inputs import detached_inputs
from amp_plugin.core.optimizer import AMP
from amp_plugin.doors.attach_callback import AttachCallback, release
from amp_plugin.doors.captured_training import CapturedTraining, check_optimizer, fused_options
from amp_plugin.doors.counters import uncounted
from amp_plugin.doors.flops import CountedFlops
from amp_plugin.doors.fsdp import inexact_settings
from amp_plugin.doors.logged_loss import loss_for_log
from amp_plugin.doors.means import Means
from amp_plugin.doors.num_items import uses_num_items
from amp_plugin.doors.trainer_mixin import MethodOfEither
from amp_plugin.doors.trainer_window import (
    EndOfEpoch,
    TrainingStep,
    prepared_once,
    step_in_every_pass,
)
from amp_plugin.doors.training_args import AMPArguments
from amp_plugin.doors.window import note_idle
from amp_plugin.doors.window_passes import WindowPasses

logger = logging.get_logger(__name__)


class AMPMixin(WindowPasses):
    """Adversarial Model Perturbation for any `transformers.Trainer`, when ``args.optim`` asks for it.

    The mixin stands before the Trainer, whose own loss, data and logs it leaves as they are::

        class MySFTTrainer(AMPMixin, SFTTrainer):
            '''SFTTrainer with AMP; its args are a MySFTConfig, see AMPArguments.'''

    The mixin logs ``loss``, the loss at the clean weights (comparable with other optimizers); ``amp_loss``, the loss at
    the perturbed weights; ``sharpness``, their difference; ``clipped``, the fraction of tensors held back;
    ``perturbation_norm``, the length of the perturbation; and ``amp_passes``, the number of forward and backward passes
    over the batch that a step has taken. Each is a mean over the steps since the last log. With an ascent policy, all
    but ``loss`` and ``amp_passes`` are means over the steps that ascended; where the policy makes no pass at the clean
    weights, ``loss`` is the loss at the perturbed weights, and there is no ``sharpness``. With ``"split(0.25)"``
    ``loss`` is that of the ascent's samples, and ``amp_loss`` that of the descent's.

    Attributes:
        amp_generators: Generators that the model or the loss draws from besides torch's, numpy's and Python's global
            ones, see :class:`amp_plugin.ExtraPasses`; default none. A subclass or the caller sets it before training.
        amp_counters: names of the Trainer's attributes, numbers or containers of numbers, that count each micro-batch
            once, in the pass at the clean weights; default those of TRL and sentence-transformers.

    Raises:
        TypeError: The arguments are not :class:`amp_plugin.AMPArguments`.
        ValueError: The host cannot run AMP exactly (DeepSpeed, FSDP1, XLA, optimizers that step inside backward);
            the message names what to use instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._amp_in_step = False  # whether the loop has called a training step that is not over
        self._amp_captured: CapturedTraining | None = None
        self._amp_flops = CountedFlops()
        self._loss_uses_num_items: bool | None = None
        super().__init__(*args, **kwargs)
        self._amp_means = Means(finite_only=self.args.logging_nan_inf_filter)
        if not isinstance(self.args, AMPArguments):
            raise TypeError(
                f"{type(self).__name__} needs AMPTrainingArguments, got {type(self.args).__name__}; to keep what is"
                f" there: @dataclass class MyConfig({type(self.args).__name__}, AMPArguments)"
            )
        if self.args.uses_amp:
            self._check_host()
        elif not self.args.compares_with_amp:
            logger.warning(
                f"{type(self).__name__} trains without Adversarial Model Perturbation, because optim is"
                f" {self.args.optim!r}; optim='amp_{self.args.optim}' trains with it"
            )
        if self.args.amp_capture and not self.args.captures:
            where = "DataParallel; launch one process for each GPU" if self.args.n_gpu > 1 else self.args.device.type
            logger.warning(f"amp_capture: steps are made as they are, without a capture, on {where}")
        self.remove_callback(AttachCallback)  # this callback is for a Trainer without the mixin
        self.callback_handler.callbacks.insert(0, EndOfEpoch(self))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass's own `training_step` and `_prepare_inputs` take part in every pass of a step."""
        super().__init_subclass__(**kwargs)
        for name, wrapped in (("training_step", step_in_every_pass), ("_prepare_inputs", prepared_once)):
            if name in vars(cls):
                setattr(cls, name, wrapped(vars(cls)[name]))

    # Static in the Trainer. So it is called alike, and `super()` reaches an override below, even one with a self.
    @MethodOfEither
    def get_optimizer_cls_and_kwargs(  # type: ignore[override]
        self, args: TrainingArguments, model: Any = None
    ) -> tuple[Any, Any]:
        """Return the Trainer's choice of the base optimizer, inside AMP if ``args.optim`` asks for it."""
        if not isinstance(args, AMPArguments) or not args.uses_amp:
            plain, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
            return plain, kwargs | fused_options(plain, args)
        refusal = ValueError(
            f"--optim {args.optim}: this base optimizer takes over the parameters or the backward pass, so AMP"
            " cannot perturb the weights around it; use e.g. amp (SGD), amp_adamw_torch or amp_adafactor"
        )
        if "lomo" in args.optim or args.optim.endswith("_layerwise"):
            raise refusal  # before the Trainer asks for their packages, or hooks the parameters
        if "8bit" in args.optim and "torch" not in args.optim:
            raise ValueError(
                f"--optim {args.optim}: with bitsandbytes the stock Trainer keeps the state of embeddings in 32 bits,"
                " which it does by the optimizer's class and so not inside AMP; use e.g. amp_adamw_torch_8bit (torchao)"
            )
        base, kwargs = super().get_optimizer_cls_and_kwargs(args.base_arguments(), model)
        kwargs |= fused_options(base, args)
        groups = kwargs.get(
            "optimizer_dict", []
        )  # a list of those from sentence-transformers, which has more parameters
        special = {"params", "model"} & kwargs.keys() or not isinstance(groups, list)
        if special or not (isinstance(base, type) and issubclass(base, Optimizer)):
            raise refusal
        return AMP, {**kwargs, **args.optimizer_kwargs(), "base_optimizer": base, "capturable": args.captures}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return all names with ``--decay_all_parameters`` (the paper's setting), else the Trainer's choice."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the Trainer's optimizer, and tell AMP the names of its parameters, for ``args.amp_parameters``."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.amp is not None and self.model is not None:
            self.amp.name_parameters(self.model)
        if self.args.captures and self.optimizer is not None:  # the caller may have made the optimizer
            check_optimizer(self.optimizer, self.amp)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; whatever ends the training, the weights are the unperturbed ones."""
        if self.model is not None:
            release(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_amp_window()
            if self._amp_captured is not None:
                self._amp_captured.close()
                self._amp_captured = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's window of micro-batches, which is remembered for the ascent."""
        self._end_amp_window()
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if num_items is not None and self._loss_uses_num_items is None:
            with uncounted(self, self.amp_counters):
                self._loss_uses_num_items = uses_num_items(self, samples[0], num_items)
            if self._loss_uses_num_items is False:
                logger.warning(
                    f"The loss of {type(self.model).__name__} does not use num_items_in_batch, so every micro-batch"
                    " counts the same, however many targets it has"
                )
                self.model_accepts_loss_kwargs, num_items = False, None
        self._amp_window.batches = list(samples)
        return samples, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Make the Trainer's step at theta + delta, after the ascent at the window's first micro-batch.

        Returns:
            The loss of this micro-batch at theta, detached; or, if the ascent took only a part of the window, an equal
            share of that part's loss.
        """
        return self._amp_step_of_loop(super().training_step, model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Prepare a micro-batch as the Trainer does; once for all passes, if it has a way of its own."""
        if getattr(super()._prepare_inputs, "__func__", None) is Trainer._prepare_inputs:
            return super()._prepare_inputs(inputs)
        return self._amp_prepared(super()._prepare_inputs, inputs)

    def _amp_step_of_loop(self, step: TrainingStep, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """Make the passes of a micro-batch by this step, unless the step of a class further out is making them."""
        if self._amp_in_step:
            return step(model, inputs, num_items)
        self._amp_in_step = True
        try:
            return loss_for_log(self, self._amp_training_step(step, model, inputs, num_items))
        finally:
            self._amp_in_step = False

    def _amp_training_step(self, step: TrainingStep, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """Make the passes of a micro-batch by the step of the outermost class, so that overrides act in each pass."""
        amp, window = self.amp, self._amp_window
        if amp is None and self.args.uses_amp:
            raise RuntimeError(f"--optim {self.args.optim}, but the optimizer given to AMPTrainer is not AMP")
        if self.args.captures:
            return self._captured_training_step(step, model, num_items)
        if amp is None or not amp.perturbs:
            return step(model, inputs, num_items)
        window.in_step = True
        try:
            if window.descent is None:
                self._ascend(amp, step, model, num_items)
            if window.rest is window.batches:
                window.amp_losses.append(self._pass(step, model, inputs, num_items))
            elif (k := window.calls - len(window.batches) + len(window.rest)) >= 0:
                with self._as_window(window.rest, num_items) as items:
                    window.amp_losses.append(self._pass(step, model, window.rest[k], items))
        except BaseException:
            self._end_amp_window()
            raise
        finally:
            window.in_step = False
        window.calls += 1
        loss = (window.clean_losses or window.amp_losses)[window.calls - 1]
        if window.calls == len(window.batches):
            self._amp_means.add(self._measures(amp))
            note_idle(amp)
            self._end_amp_window()
            if self.accelerator.scaler is not None:
                amp.propagate_overflow()
        return loss

    def _amp_prepared(self, prepare: Callable[[Any], Any], inputs: Any) -> Any:
        """Return the prepared micro-batch; within a step the first pass prepares it, and later passes reuse it."""
        window = self._amp_window
        if not window.in_step:
            return prepare(inputs)
        if window.current not in window.prepared:
            if self.amp is not None and self.amp.perturbed:
                raise ValueError(
                    f"{type(self).__name__} prepares batches by itself, perhaps with the model, and would see perturbed"
                    f" weights with amp_ascent={self.args.amp_ascent!r}; use amp_ascent='full' or 'every(2)'"
                )
            window.prepares = True
            try:
                window.prepared[window.current] = prepare(inputs)
            finally:
                window.prepares = False
        return detached_inputs(window.prepared[window.current])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does; a training record gains ``amp_loss``, ``sharpness`` and the statistics."""
        if "loss" in logs and self._amp_means:
            logs.update(self._amp_means.taken(self.accelerator))
        if self.amp is not None and self.amp.capturable and self.amp.skipped_steps:
            tell_of_skipped_step(self.amp)  # the device alone knew; the last log is that of the end
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the Trainer's count, times the number of passes of the step under way."""
        amp = self.amp
        passes = amp.passes if amp is not None and amp.perturbs else 1
        return round(passes * self._amp_flops.count(self, super().floating_point_ops, inputs))

    def store_flos(self) -> None:
        """Store the sum as the Trainer does, and count anew from now on."""
        super().store_flos()
        self._amp_flops.clear()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; refuse to while the weights are perturbed."""
        self._check_clean_weights("evaluate or predict")
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as the Trainer does; refuse to while the weights are perturbed."""
        self._check_clean_weights("save")
        super().save_model(*args, **kwargs)

    def _captured_training_step(self, step: TrainingStep, model: nn.Module, num_items: Any) -> Tensor:
        """Make all passes over the window at its first micro-batch, or replay them; then return a loss a call."""
        window = self._amp_window
        if not window.returned:
            captured = self._amp_captured
            if captured is None or captured.model is not model:
                if captured is not None:
                    captured.close()
                optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
                captured = self._amp_captured = CapturedTraining(model, optimizer, self.amp, self.args.device)
                if self.amp is not None and self.args.torch_compile:
                    self.amp.perturbation.compile()
            passes = functools.partial(self._passes, step, model)
            made = captured.passes(passes, window.batches, num_items)
            self._amp_means.add(made.measures)
            window.returned, self._amp_window = list(made.losses), window
        return window.returned.pop(0)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        clip = functools.partial(super()._clip_grad_norm, model)
        return clip() if self._amp_captured is None else self._amp_captured.clip(clip)

    def _check_clean_weights(self, action: str) -> None:
        if self.amp is not None and self.amp.perturbed:
            raise RuntimeError(
                f"cannot {action} in the middle of a gradient accumulation window: the weights are perturbed there;"
                " do it in on_step_end instead of on_substep_end"
            )

    def _check_host(self) -> None:
        fsdp = inexact_settings(self.accelerator) if self.is_fsdp_enabled else ""
        reasons = {
            "DeepSpeed (it steps inside backward); use DDP or FSDP2": self.is_deepspeed_enabled,
            fsdp: bool(fsdp),
            "amp_capture under FSDP; leave it off": self.is_fsdp_enabled and self.args.amp_capture,
            "amp_sync_ascent=False under FSDP, where no process has a whole parameter; leave it on, or use DDP": (
                self.is_fsdp_enabled and not self.args.amp_sync_ascent
            ),
            "use_adaptive_entropy, which adapts in every pass; leave it out": getattr(
                self.args, "use_adaptive_entropy", False
            ),
            "XLA; use CUDA or CPU": bool(self.is_fsdp_xla_enabled) or self.args.device.type == "xla",
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"--optim {self.args.optim} does not work exactly with {reason}")
