"""AMP in fastai: a callback that makes all passes over a batch where the Learner makes one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

from fastai.callback.core import Callback, CancelBackwardException, CancelStepException
from fastai.callback.training import GradientAccumulation

from amp_plugin.core.distributed import data_parallel
from amp_plugin.core.find import find_amp
from amp_plugin.core.grad_scaler import scale_of
from amp_plugin.core.inputs import detached_inputs
from amp_plugin.core.replay import BatchNormPolicy, ExtraPasses, RngPolicy
from amp_plugin.doors.window import ascend_over, note_idle


class AMPCallback(Callback):  # type: ignore[misc]
    """Trains a Learner with AMP, its optimizer::

        opt_func = partial(OptimWrapper, opt=partial(AMP, epsilon=0.5))
        learn = Learner(dls, model, loss_func=loss_func, opt_func=opt_func, cbs=AMPCallback())

    All passes of a step go through what other callbacks do in ``after_pred``, ``after_loss`` and ``before_backward``,
    such as MixUp's loss and RNNRegularizer's terms. The loss that the Learner shows is the one at the weights that are
    kept. With GradientAccumulation each batch is perturbed for itself. The ascent follows the loss as callbacks whose
    ``order`` is up to that of AMPCallback, 5, have left it.

    Args:
        batch_norm: passes that update running statistics, see :class:`amp_plugin.ExtraPasses`; default ``"clean"``.
        rng: random numbers of the passes, see :class:`amp_plugin.ExtraPasses`; default ``"same"``.
        generators: further generators that a pass draws from, see :class:`amp_plugin.ExtraPasses`; default none.
    """

    order = GradientAccumulation.order - 1
    run_valid = False

    def __init__(
        self, batch_norm: BatchNormPolicy = "clean", rng: RngPolicy = "same", generators: Sequence[Any] = ()
    ) -> None:
        self._options: dict[str, Any] = {"batch_norm": batch_norm, "rng": rng, "generators": generators}

    def before_fit(self) -> None:
        """Take the place of the Learner's training pass; TypeError if its optimizer is not AMP."""
        self._amp = find_amp(getattr(self.learn.opt, "opt", None))
        if self._amp is None:
            raise TypeError(
                f"AMPCallback needs amp_plugin.AMP, got {type(self.learn.opt).__name__}; give the Learner"
                " opt_func=partial(OptimWrapper, opt=AMP)"
            )
        self._passes = ExtraPasses(self.learn.model, **self._options)
        self.learn._do_one_batch = self._make_passes

    def after_fit(self) -> None:
        """Give the Learner its training pass back."""
        self.learn.__dict__.pop("_do_one_batch", None)

    def after_loss(self) -> None:
        """Keep the mean loss as it is, because GradientAccumulation divides the other one in place."""
        self._mean_loss = self.learn.loss_grad
        self.learn.loss_grad = self._mean_loss.clone()

    def _make_passes(self) -> None:
        learn, amp, passes = self.learn, self._amp, self._passes
        if amp is None or not (learn.training and learn.yb and amp.perturbs):
            type(learn)._do_one_batch(learn)
            return
        batch, ddp, scale = (learn.xb, learn.yb), data_parallel(learn.model), scale_of(getattr(learn, "scaler", None))
        shown: list[tuple[Any, Any]] = []
        try:
            culprit = "the model or a callback changes the batch"
            with closing(ascend_over(amp, passes, learn.model, [batch], scale, culprit=culprit)) as ascent:
                for part, sync in ascent:
                    with nullcontext() if sync or ddp is None else ddp.no_sync():
                        self._forward(detached_inputs(part[0]), again=bool(shown))
                        passes.spare_leaves(self._mean_loss)
                        (self._mean_loss * scale).backward()
                    shown.append((learn.pred, learn.loss.detach()))
            with passes.nth(len(shown)):
                self._forward(amp.descent_batches([batch])[0], again=bool(shown))
                learn._with_events(learn._backward, "backward", CancelBackwardException)
            note_idle(amp)
        finally:
            amp.restore()
            learn.xb, learn.yb = batch
        if shown:
            learn.pred, learn.loss = shown[0]
        if getattr(learn, "scaler", None) is not None:
            amp.propagate_overflow()
        learn._with_events(learn._step, "step", CancelStepException)
        learn.opt.zero_grad()

    def _forward(self, batch: tuple[Any, Any], *, again: bool) -> None:
        """Compute the loss of a batch as the Learner does."""
        learn = self.learn
        learn.xb, learn.yb = batch
        if again and hasattr(learn, "mixed_precision"):  # which left autocast after the loss of the pass before
            learn.mixed_precision.before_batch()
        learn.pred = learn.model(*learn.xb)
        learn("after_pred")
        learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
        learn.loss = learn.loss_grad.clone()
        learn("after_loss")
