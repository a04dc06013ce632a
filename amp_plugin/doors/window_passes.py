"""The passes over a Trainer's window of micro-batches: at theta, at theta + delta, and back to theta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from amp_plugin.core.compilation import detached_for_good
from amp_plugin.core.find import find_amp
from amp_plugin.core.gathered import forget_pass, gather_anew
from amp_plugin.core.grad_scaler import scale_of
from amp_plugin.core.inputs import detached_inputs
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.doors.captured_training import Passes
from amp_plugin.doors.counters import COUNTERS, uncounted
from amp_plugin.doors.generation import generation_refused
from amp_plugin.doors.names import own_names
from amp_plugin.doors.trainer_mixin import TrainerMixin
from amp_plugin.doors.trainer_window import TrainingStep, Window, backward_observed, gradient_sync
from amp_plugin.doors.training_args import AMPArguments
from amp_plugin.doors.window import ascend_over, note_idle


class WindowPasses(TrainerMixin):
    """The passes of a step, each of which is the Trainer's own step on every micro-batch of the window."""

    args: AMPArguments
    amp_generators: Sequence[Any] = ()
    amp_counters: Sequence[str] = COUNTERS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._amp_window = Window()
        self._amp_extra_passes: ExtraPasses | None = None
        super().__init__(*args, **kwargs)

    @property
    def amp(self) -> AMP | None:
        """The AMP optimizer inside whatever accelerate wrapped around it; None when training without AMP."""
        return find_amp(self.optimizer)

    def _ascend(self, amp: AMP, step: TrainingStep, model: nn.Module, num_items: Any) -> None:
        """Run the window at theta, perturb, and leave the weights perturbed until `_end_amp_window`."""
        amp.zero_grad()
        amp.total_steps = self.state.max_steps
        scale = scale_of(self.accelerator.scaler)
        if self._amp_extra_passes is None or self._amp_extra_passes.module is not model:
            self._amp_extra_passes = ExtraPasses(
                model,
                batch_norm=self.args.amp_batch_norm,  # type: ignore[arg-type]
                rng=self.args.amp_rng,  # type: ignore[arg-type]
                generators=self.amp_generators,
            )
            gather_anew(model)  # for the names are of the parameters, not of what an evaluation has gathered
            amp.name_parameters(own_names(model))  # of parameters that accelerate may have replaced
        passes, window = self._amp_extra_passes, self._amp_window
        made, counted, k = 0, False, len(window.batches)
        window.descent = ExitStack()
        window.descent.callback(self._end_passes, amp, model, window)
        ascent = ascend_over(
            amp,
            passes,
            model,
            window.batches,
            scale,
            sync=self.args.amp_sync_ascent,
            culprit=f"{type(self).__name__} or its model changes a batch",
        )
        with closing(ascent), backward_observed(self.accelerator, passes.spare_leaves):
            for part, sync in ascent:
                # The pass at theta counts, unless it is on a part of what the descent, which then counts, is on.
                window.counts = made == 0 and (part is window.batches or amp.progress.rest is not None)
                counted |= window.counts and part is window.batches
                losses = self._passes_over(step, model, part, num_items, sync=sync, detach=True)
                if made == 0:
                    window.clean_losses = losses if len(part) == k else [torch.stack(losses).sum() / k] * k
                made += 1
        window.counts = not counted
        window.rest = amp.descent_batches(window.batches)
        window.descent.enter_context(passes.nth(made))

    def _passes_over(
        self, step: TrainingStep, model: nn.Module, part: Sequence[Any], num_items: Any, *, sync: bool, detach: bool
    ) -> list[Tensor]:
        """Make the step of each micro-batch of a part of the window, as if the part were the window."""
        losses = []
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        loop_syncs = each or len(self._amp_window.batches) == 1  # for its first micro-batch, in whose place this is
        with self._as_window(part, num_items) as items:
            for k, inputs in enumerate(part, 1):
                with gradient_sync(model, sync and (each or k == len(part)), loop_syncs):
                    losses.append(self._pass(step, model, inputs, items, detach=detach))
        return losses

    def _pass(
        self, step: TrainingStep, model: nn.Module, inputs: Any, num_items: Any, *, detach: bool = False
    ) -> Tensor:
        """Make the step of a micro-batch; an ascent detaches its inputs, whose gradient the descent may want."""
        window = self._amp_window
        window.current = id(inputs)
        generates = generation_refused(self.model, type(self).__name__, unless=lambda: window.prepares)
        with generates, nullcontext() if window.counts else uncounted(self, self.amp_counters):
            return detached_for_good(step(model, detached_inputs(inputs) if detach else inputs, num_items))

    @contextmanager
    def _as_window(self, part: Sequence[Any], num_items: Any) -> Iterator[Any]:
        """Let the Trainer take a part of the window for all of it; yield the number of items in the part."""
        whole = self.current_gradient_accumulation_steps
        if num_items is not None and part is not self._amp_window.batches:
            num_items = self._get_num_items_in_batch(list(part), self.args.device)
        try:
            self.current_gradient_accumulation_steps = len(part)
            yield num_items
        finally:
            self.current_gradient_accumulation_steps = whole

    def _passes(self, step: TrainingStep, model: nn.Module, batches: Sequence[Any], num_items: Any) -> Passes:
        """Make all passes over a window, from theta and back to it."""
        amp = self.amp
        window = self._amp_window = Window(batches, in_step=True)
        try:
            if amp is not None and amp.perturbs:
                self._ascend(amp, step, model, num_items)
            rest = window.rest or batches
            window.amp_losses = self._passes_over(step, model, rest, num_items, sync=True, detach=False)
            measures = {}
            if amp is not None and amp.perturbs:
                measures = self._measures(amp)
                note_idle(amp)
            return Passes(window.clean_losses or window.amp_losses, measures)
        finally:
            self._end_amp_window()

    def _end_amp_window(self) -> None:
        """Forget the window; if the weights are perturbed, go back to theta and the clean pass's statistics."""
        window, self._amp_window = self._amp_window, Window()
        if window.descent is not None:
            window.descent.close()

    @staticmethod
    def _end_passes(amp: AMP, model: nn.Module, window: Window) -> None:
        """Go back to theta; FSDP keeps nothing of theta + delta, nor of a window that was cut short."""
        amp.restore()
        if window.calls < len(window.batches):
            forget_pass(model)
        else:
            gather_anew(model)

    def _measures(self, amp: AMP) -> dict[str, Tensor | float]:
        """Return what this step adds to the means that the next log shows."""
        measures: dict[str, Tensor | float] = {"amp_passes": amp.passes}
        if not amp.perturbed:
            return measures
        amp_loss = measures["amp_loss"] = _sum(self._amp_window.amp_losses)
        if self._amp_window.clean_losses:
            measures["sharpness"] = amp_loss - _sum(self._amp_window.clean_losses)
        return measures | amp.statistics()


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
