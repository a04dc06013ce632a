"""A map-style data set that makes whole batches, and the collator that lets them through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from amp_plugin.data.augment import DRAWS, Augmentation, Augmenter
from amp_plugin.data.draws import uniform_draws
from amp_plugin.data.images import ImageSplit
from amp_plugin.data.resident import ResidentImages, not_resident_because
from amp_plugin.data.settings import DatasetSettings

Batch = dict[str, Tensor]


class DeviceBatch(Batch):
    """A batch that lies on the device already, which a loader is not to pin."""

    def pin_memory(self) -> DeviceBatch:
        """Return the batch as it is."""
        return self


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

    Attributes:
        device_batch: the function that makes pixel values and labels of a table of whole numbers on the device; None
            while the images are on the host, see `to`. It may be replaced by one that does the same faster, a captured
            CUDA graph for example, if that returns new tensors at every call: accelerate's loader asks for a batch
            before the one before it has been used.

    Raises:
        ValueError: ``augment`` or the policy is unknown, or the seed is out of range.
    """

    device_batch: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    _resident: ResidentImages | None = None

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

    @property
    def resident_reason(self) -> str | None:
        """Why the device cannot make these batches bit for bit, for a sentence; None if it can, see `to`."""
        return not_resident_because(self._augmenter)

    def to(self, device: torch.device | str) -> ImageBatches:
        """Move the images, as bytes, to a device that from now on makes the batches: the same ones, to the bit.

        The padded images have to fit there beside the model, else torch tells that memory is short. The loader has to
        go without workers, which cannot share the memory of a device.

        Returns:
            The data set itself.

        Raises:
            ValueError: the device would round otherwise; `resident_reason` tells beforehand.
        """
        if self.resident_reason is not None:
            raise ValueError(f"these batches are made on the CPU, not on a device: {self.resident_reason}")
        self._resident = ResidentImages(self.split, self._augmenter, torch.device(device))
        self.device_batch = self._resident.batch
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own images on the device: those are large, and a captured function cannot be copied.
        device = None if self._resident is None else self._resident.device
        return {**vars(self), "_resident": device, "device_batch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state.pop("_resident", None)
        vars(self).update(state)
        if device is not None:
            self.to(device)

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
        draws = self._draws[chosen]
        if self._resident is not None and self.device_batch is not None:
            if get_worker_info() is not None:
                raise RuntimeError(
                    f"the images lie on {self._resident.device}, where the workers of a loader cannot reach them; load"
                    " with num_workers=0 (--dataloader_num_workers 0)"
                )
            pixel_values, labels = self.device_batch(self._resident.table(chosen, draws))
            return DeviceBatch(pixel_values=pixel_values, labels=labels)
        pixel_values = self._augmenter(self.split.images[chosen], draws)
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(self.split.labels[chosen])}


def collate(samples: Batch | Sequence[Any]) -> Any:
    """Let a batch of `ImageBatches` through as it is; stack samples that come one by one.

    A loader takes it as `DataLoader(..., collate_fn=collate)`, the Trainer as `Trainer(..., data_collator=collate)`.
    """
    return samples if isinstance(samples, dict) else default_collate(list(samples))
