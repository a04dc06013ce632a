"""Random model perturbation over the accumulation window."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor, nn

from amp_plugin import AMPTrainer
from amp_plugin.train.methods.optimizers import RMP


class RandomPerturbationTrainer(AMPTrainer):
    """`AMPTrainer` that knows of an optimizer without an ascent pass.

    All micro-batches of a window see one perturbation, which is a function of the seed and the number of the step:
    the same in every process and in a resumed run. The logged ``loss`` is the one at the perturbed weights, and
    BatchNorm's running statistics are of that pass too, since there is no other.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """AMPTrainer's step, or the stock one at randomly perturbed weights."""
        rmp = self.amp
        if not isinstance(rmp, RMP) or not rmp.perturbs:
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            if self._descent is None:
                self._descent = ExitStack()
                self._descent.callback(rmp.restore)
                entropy = np.random.SeedSequence([self.args.seed, self.state.global_step])
                rmp.perturb(int(entropy.generate_state(1, np.uint64)[0]))
            loss = super(AMPTrainer, self).training_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._end_window()
            raise
        if self.accelerator.sync_gradients:
            self._end_window()
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """AMPTrainer's count; of one pass if there is no ascent."""
        if isinstance(self.amp, RMP):
            return int(super(AMPTrainer, self).floating_point_ops(inputs))
        return super().floating_point_ops(inputs)
