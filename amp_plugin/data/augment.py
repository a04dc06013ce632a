"""Crop, flip, AutoAugment, Cutout and normalisation of a whole batch on the CPU.

The random numbers are an argument, one row for each sample, so the same row always means the same augmentation.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from amp_plugin.data.autoaugment import BatchAutoAugment
from amp_plugin.data.settings import DatasetSettings

Augmentation = Literal["none", "plain", "cutout", "autoaugment"]
Images = npt.NDArray[np.uint8]
Draws = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Columns of a row of draws. All modes use the same columns, so modes differ only in what they add.
CROP, FLIP, CUTOUT, _POLICY, _PROBS, _SIGNS = slice(0, 2), 2, slice(3, 5), 5, slice(6, 8), slice(8, 10)
DRAWS = 10


class Augmenter:
    """Turn uint8 images of one size (H, W) into normalised float32 batches, resized (bicubic) to ``output_size``.

    ``augment`` is "none"; "plain" (crop and flip); "cutout" (plain and Cutout); or "autoaugment" (plain, AutoAugment
    and Cutout, as in the AMP paper; no crop where the settings say so).
    """

    def __init__(
        self,
        settings: DatasetSettings,
        augment: Augmentation,
        image_size: tuple[int, int],
        *,
        output_size: tuple[int, int] | None = None,
        channels_last: bool = False,
    ) -> None:
        if augment not in get_args(Augmentation):
            raise ValueError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {augment!r}")
        self.settings = settings
        self.autoaugment = None
        if augment == "autoaugment":
            self.autoaugment = BatchAutoAugment(settings.autoaugment, image_size, settings.fill)
        self.pad = 0 if augment == "none" or (self.autoaugment and not settings.autoaugment_crop) else settings.pad
        self.flip = settings.flip and augment != "none"
        self.cutout = augment in ("cutout", "autoaugment")
        self.image_size, self.output_size = image_size, output_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (settings.mean, settings.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: Images, draws: Draws) -> Tensor:
        """Augment and normalise a batch, from uint8 (B, H, W, 3) to float32 (B, 3, H, W) of the output size.

        Draws (B, DRAWS) are independent and uniform in [0, 1), and ignored when ``augment`` is "none".
        """
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if self.pad:
            planes = random_crop(planes, draws[:, CROP], self.pad, self.settings.fill)
        if self.flip:
            planes = random_flip(planes, draws[:, FLIP])
        if self.autoaugment is not None:
            numbers = policy_numbers(draws, self.autoaugment.num_sub_policies)
            planes = self.autoaugment(torch.from_numpy(planes), *numbers).numpy()
        if self.cutout:
            planes = cutout(planes, draws[:, CUTOUT], self.settings.cutout_length)
        pixels = torch.from_numpy(planes)
        if self.output_size is not None:
            pixels = resize(pixels, list(self.output_size), InterpolationMode.BICUBIC, antialias=True)
        # Black is 0 also after the conversion to [0, 1], so Cutout on bytes is Cutout right before normalisation.
        batch = pixels.float().mul_(self.scale).add_(self.shift)
        return batch.contiguous(memory_format=self.memory_format)


def random_crop(images: Images, draws: Draws, pad: int, fill: int) -> Images:
    """Pad images (B, 3, H, W) on every side and cut out a window of their size, at offsets chosen by draws (B, 2)."""
    height, width = images.shape[2:]
    padded = np.full((*images.shape[:2], height + 2 * pad, width + 2 * pad), fill, dtype=np.uint8)
    padded[:, :, pad : pad + height, pad : pad + width] = images
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))  # a view (B, 3, top, left, H, W)
    top, left = choose(draws, 2 * pad + 1).T
    cropped: Images = windows.transpose(0, 2, 3, 1, 4, 5)[np.arange(len(images)), top, left]
    return cropped


def random_flip(images: Images, draws: Draws) -> Images:
    """Return a copy of images (B, 3, H, W) in which those with a draw (B,) below one half are mirrored."""
    flipped = images.copy()
    chosen = draws < 0.5
    flipped[chosen] = images[chosen][..., ::-1]
    return flipped


def cutout(images: Images, draws: Draws, length: int) -> Images:
    """Blacken a square of side ``length`` in each image (B, 3, H, W).

    Draws (B, 2) choose its centre among all pixels, so the square may cross the border (DeVries and Taylor,
    https://arxiv.org/abs/1708.04552). A square of even length has one pixel more before the centre than after it.
    """
    height, width = images.shape[2:]
    rows = outside_span(choose(draws[:, 0], height), height, length)
    columns = outside_span(choose(draws[:, 1], width), width, length)
    kept: Images = images * (rows[:, None, :, None] | columns[:, None, None, :])
    return kept


def outside_span(centres: Integers, size: int, length: int) -> npt.NDArray[np.bool_]:
    """Mark in each row (B, size) the positions outside a span of ``length`` around one of the centres (B,)."""
    start = centres[:, None] - length // 2
    positions = np.arange(size)
    return (positions < start) | (positions >= start + length)


def policy_numbers(draws: Draws, num_sub_policies: int) -> tuple[Integers, Draws, Integers]:
    """Turn draws (B, DRAWS) into the random numbers that `BatchAutoAugment` takes."""
    return choose(draws[:, _POLICY], num_sub_policies), draws[:, _PROBS], choose(draws[:, _SIGNS], 2)


def choose(draws: Draws, n: int | Integers) -> Integers:
    """Turn uniform draws into integers from 0 to n - 1, equally likely."""
    return (draws * n).astype(np.int64)
