"""A callback that tells the training images which epoch begins, where `transformers.Trainer` does not."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerState


class EpochCallback(TrainerCallback):
    """Call ``set_epoch`` of the training data as each epoch begins: `Trainer(callbacks=[EpochCallback()])`.

    accelerate forwards the epoch to the data set unless the sampler inside a wrapped batch sampler has a
    ``set_epoch`` of its own. The Trainer's sampler has one, and its batch sampler is wrapped in a run of several
    processes and in an epoch resumed in the middle. Without this callback, the run of several processes would see
    one augmentation for ever, and the resumed epoch would see the augmentation of epoch 0.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forward the epoch to a data set that has ``set_epoch``."""
        set_epoch = getattr(getattr(kwargs.get("train_dataloader"), "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch))
