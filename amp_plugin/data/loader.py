"""A map-style data set that makes whole batches, and the collator that lets them through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from amp_plugin.data.augment import DRAWS, Augmentation, Augmenter
from amp_plugin.data.draws import uniform_draws
from amp_plugin.data.images import ImageSplit
from amp_plugin.data.settings import DatasetSettings

Batch = dict[str, Tensor]


class ImageBatches(Dataset[Batch]):
    """Augmented, normalised batches of one split, for a `DataLoader` with `collate`.

    The augmentation of sample i in epoch e depends on the seed, e and i alone. The number of workers or processes,
    the batch size, the order, and a resumption do not change it.

    Args:
        split: images and labels.
        settings: settings of the data set.
        augment: augmentation, see `Augmenter`; "none" to evaluate.
        seed: seed of the augmentation, in [0, 2**64).
        image_size: side in pixels to which the augmented images are resized (bicubic); None for no resizing.
        channels_last: whether the images have that memory format.

    Raises:
        ValueError: ``augment`` or the policy is unknown, or the seed is out of range.
    """

    def __init__(
        self,
        split: ImageSplit,
        settings: DatasetSettings,
        augment: Augmentation = "none",
        *,
        seed: int = 0,
        image_size: int | None = None,
        channels_last: bool = False,
    ) -> None:
        self.split = split
        self.settings = settings
        self.seed = seed
        height, width = split.images.shape[1:3]
        size = None if image_size is None or image_size == height == width else (image_size, image_size)
        self._augmenter = Augmenter(settings, augment, (height, width), output_size=size, channels_last=channels_last)
        # The epoch lies in shared memory, so that persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._drawn_epoch = 0
        self._draws = uniform_draws(seed, 0, len(self), DRAWS)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation comes next, here and in the workers that run already.

        accelerate's prepared `DataLoader` calls this method as each epoch begins, except with a seedable sampler (the
        Trainer's default) in several processes, and in a resumed epoch. There the loop has to call it; the Trainer
        does with `amp_plugin.data.callback.EpochCallback`.

        Raises:
            ValueError: the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Batch:
        """Return one sample: pixel_values float32 (3, H, W) and labels, an int64 scalar."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch, as a `DataLoader` asks for it: pixel_values float32 (B, 3, H, W), labels int64 (B,)."""
        chosen = np.asarray(indices, dtype=np.int64)
        epoch = int(self._epoch)
        if epoch != self._drawn_epoch:
            self._draws, self._drawn_epoch = uniform_draws(self.seed, epoch, len(self), DRAWS), epoch
        pixel_values = self._augmenter(self.split.images[chosen], self._draws[chosen])
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(self.split.labels[chosen])}


def collate(samples: Batch | Sequence[Any]) -> Any:
    """Let a batch of `ImageBatches` through as it is; stack samples that come one by one.

    A loader takes it as `DataLoader(..., collate_fn=collate)`, the Trainer as `Trainer(..., data_collator=collate)`.
    """
    return samples if isinstance(samples, dict) else default_collate(list(samples))
