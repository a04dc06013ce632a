"""Lightning's closures: those that would train without AMP, or with another AMP, are refused or left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from wrapt import when_imported

from amp_plugin.core.find import find_amp


def watch_lightning() -> None:
    """Look at what Lightning gives to an AMP optimizer's ``step()``, in both packages that Lightning comes in."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        when_imported(f"{package}.plugins.precision.precision")(_check_closures)


def _check_closures(module: Any) -> None:
    optimizer_step = module.Precision.optimizer_step

    @functools.wraps(optimizer_step)
    def checked_step(self: Any, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        amp = find_amp(optimizer)
        if amp is None:
            return optimizer_step(self, optimizer, model, closure, **kwargs)
        if not model.automatic_optimization and getattr(closure, "__name__", "") == "do_nothing_closure":
            # This is Lightning's `step()` without a closure: the loop has made the passes, or nobody has.
            self._after_closure(model, optimizer)
            return optimizer.step(**kwargs)
        accumulated = model.trainer.accumulate_grad_batches
        if model.automatic_optimization and accumulated > 1 and amp.perturbs and not amp.attached:
            raise RuntimeError(
                f"with accumulate_grad_batches={accumulated} Lightning gives the optimizer the last micro-batch of each"
                " window alone, so AMP would perturb for that one and too little: let training_step return the loss of"
                " an amp_plugin.LossModule(model, criterion), and call amp_plugin.attach(optimizer, loss_module) in"
                " configure_optimizers"
            )
        return optimizer_step(self, optimizer, model, closure, **kwargs)

    module.Precision.optimizer_step = checked_step
