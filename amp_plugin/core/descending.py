"""The step at theta: only after the ascents that were asked for, and only if what they found was finite."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

from torch import Tensor

from amp_plugin.core.fused import step_where_finite
from amp_plugin.core.scaled import Scaled


class Descending(Scaled):
    """The part of :class:`amp_plugin.AMP` that lets the base optimizer make its step, or says why not."""

    _skipped: int | Tensor = 0

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because an ascent gradient was not finite; waits for the device if `capturable`."""
        return int(self._skipped)

    def _require_ascents(self) -> bool:
        """Refuse to train without the perturbation while claiming to train with it; whether this is a step at all."""
        if not self.ascends or self._ascents == self.inner_iter or self._finished:
            return True
        if not self._ascents and all(float(g["lr"]) == 0.0 for g in self.param_groups):
            return False  # harmless, and how torch.distributed.checkpoint makes an optimizer build its state
        raise RuntimeError(
            f"AMP.step() without a closure needs {self.inner_iter} ascent step(s) before it, got {self._ascents}; it"
            " would train without the perturbation that you asked for. Use one of: optimizer.step(closure);"
            " loss.backward(), optimizer.ascend(), loss.backward(), optimizer.step(); the same with `for _ in"
            " optimizer.ascent_passes(): loss.backward()`, whatever the ascent policy; amp_plugin.attach(optimizer,"
            " module) with a module that returns its loss; or amp_plugin.AMPTrainer."
            " (After an interrupted step, optimizer.restore() starts afresh.)"
        )

    def _descend(self, counts: bool = True) -> None:
        """The base optimizer's step at theta, unless the ascent was not finite.

        Args:
            counts: whether it is one of the training, for the ascent policy.
        """
        self._begin()
        self._stepped, self._plain = True, False
        if self._perturbation.disturbed:
            self._perturbation.disturbed = False
            raise RuntimeError(
                "a gradient hook changed the weights while they were perturbed, and the change was undone: an optimizer"
                " that steps inside the backward pass cannot be used with AMP; let AMP's base_optimizer make the step"
            )
        self._warn_unreached()
        finished, self._finished = self._finished, []
        ascended, self._ascents = self._ascents > 0, 0
        if self.capturable:
            flags = [d.finite for d in finished if d.finite is not None]
            if ascended and self._perturbation.finite is not None:
                flags.append(self._perturbation.finite)
            skipped = step_where_finite(self.base_optimizer, flags, self)
            self._skipped = skipped + self._skipped if isinstance(self._skipped, int) else self._skipped.add_(skipped)
            return
        if self._scaler_found_inf():
            return  # it will lower its scale
        if (ascended and not self.ascent_was_finite()) or not all(d.was_finite() for d in finished):
            self._skipped += 1
            warnings.warn(
                "AMP: the ascent gradient had NaN or infinite entries; the step was skipped and the weights left as"
                f" they were ({self.skipped_steps} so far)",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        with self.policy.around_step(self.base_optimizer, self._in_ball()) if counts else nullcontext():
            self.base_optimizer.step()
