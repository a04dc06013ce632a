"""A data set that lies on the device, and batches that the device makes of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from amp_plugin.data.augment import CROP, CUTOUT, FLIP, Augmenter, Draws, Integers, choose, outside_span, policy_numbers
from amp_plugin.data.images import ImageSplit
from amp_plugin.data.resident_autoaugment import ResidentAutoAugment

_MAX_EXACT = 2**24  # float32 holds all whole numbers up to here


def not_resident_because(augmenter: Augmenter) -> str | None:
    """Say in words why a device cannot make the very batches that an augmenter makes; None if it can."""
    height, width = augmenter.image_size
    if augmenter.output_size is not None:
        resized = "x".join(map(str, augmenter.output_size))
        return f"the images are resized to {resized}, which a device rounds otherwise than the CPU does"
    if augmenter.autoaugment is not None and 255 * height * width > _MAX_EXACT:
        return (
            f"AutoAugment takes means over {height}x{width} pixels, which a device rounds otherwise than the CPU does"
        )
    return None


class ResidentImages:
    """Images and labels of a split on a device, which makes the batches of an `Augmenter` there, to the bit.

    A batch costs the host a small table of whole numbers (`table`) and the device a dozen kernels (`batch`), and some
    150 more with AutoAugment. The images take n (H + 2 pad) (W + 2 pad) 3 bytes, 240 MB for CIFAR-10.

    Args:
        split: images and labels.
        augmenter: the augmentation, for which `not_resident_because` finds nothing.
        device: where the images lie, and where the batches are made.
    """

    def __init__(self, split: ImageSplit, augmenter: Augmenter, device: torch.device) -> None:
        settings, self.device = augmenter.settings, device
        height, width = augmenter.image_size
        self._pad = augmenter.pad
        self._flip, self._cutout = augmenter.flip, augmenter.cutout
        self._memory_format = augmenter.memory_format
        self._autoaugment = None
        if augmenter.autoaugment is not None:
            self._autoaugment = ResidentAutoAugment(augmenter.autoaugment, device)
        size = (len(split), 3, height + 2 * self._pad, width + 2 * self._pad)
        padded = torch.empty(size, dtype=torch.uint8, device=device, memory_format=self._memory_format)
        inside = padded.fill_(settings.fill)[..., self._pad : self._pad + height, self._pad : self._pad + width]
        inside.copy_(torch.tensor(split.images, device=device).permute(0, 3, 1, 2))
        self._windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)  # a view, as in numpy
        self._labels = torch.tensor(split.labels, device=device)
        self._scale, self._shift = augmenter.scale.to(device), augmenter.shift.to(device)
        # Rows of these tell what a square around a centre leaves, for every centre.
        self._size = (height, width)
        self._rows, self._columns = (
            torch.from_numpy(outside_span(np.arange(side), side, settings.cutout_length)).to(device)
            for side in self._size
        )

    def table(self, indices: Integers, draws: Draws) -> Tensor:
        """Return what `batch` takes, int64 (B, 8) on the device, without waiting for the device.

        Args:
            indices: of the images, (B,).
            draws: of the images, see `Augmenter`.
        """
        table = np.zeros((len(indices), 8), np.int64)
        table[:, 0] = indices
        table[:, 1:3] = choose(draws[:, CROP], 2 * self._pad + 1)
        table[:, 3] = draws[:, FLIP] < 0.5
        table[:, 4:6] = choose(draws[:, CUTOUT], np.array(self._size))
        if self._autoaugment is not None:
            policy = self._autoaugment.host
            table[:, 6:8] = policy.choose(*policy_numbers(draws, policy.num_sub_policies))
        on_host = torch.from_numpy(table)
        if self.device.type == "cuda":
            on_host = on_host.pin_memory()  # torch keeps pinned memory until the copy is over
        return on_host.to(self.device, non_blocking=True)

    def batch(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Make the batch that a table describes: pixel values, float32 (B, 3, H, W), and labels, int64 (B,).

        The function reads nothing on the host and its shapes depend on B alone, so that a CUDA graph can capture it. A
        compiler that turns a multiplication and an addition into one rounding would change the last bits.
        """
        index, top, left, mirrored, row, column, *operations = table.unbind(1)
        pixels = self._windows[index, top, left]
        if self._flip:
            pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(3), pixels)
        if self._autoaugment is not None:
            for operation in operations:
                pixels = self._autoaugment(pixels, operation)
        if self._cutout:
            pixels = pixels * (self._rows[row][:, None, :, None] | self._columns[column][:, None, None, :])
        pixels = (pixels * self._scale).add_(self._shift)
        return pixels.contiguous(memory_format=self._memory_format), self._labels[index]
