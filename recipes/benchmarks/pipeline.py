"""The input pipeline against torchvision's transforms in a `DataLoader`, image by image; one thread a process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from amp_plugin.data import Augmentation, ImageBatches, ImageSplit, collate, load_images
from amp_plugin.data.settings import BUNDLED, DatasetSettings
from benchmarks.rows import Row
from benchmarks.turns import Ways, compare, repeat

AUGMENTATIONS: tuple[Augmentation, ...] = ("plain", "cutout", "autoaugment")
IMAGES, BATCH_SIZE, ROUNDS = 10_000, 50, 5


class PerImage(Dataset[tuple[Tensor, int]]):
    """Images that are augmented one after the other as PIL images, as in most training scripts."""

    def __init__(self, split: ImageSplit, settings: DatasetSettings, augment: Augmentation) -> None:
        self.split, self.settings, self.cutout = split, settings, augment != "plain"
        fill, policy = settings.fill, transforms.AutoAugmentPolicy(settings.autoaugment)
        auto = [transforms.AutoAugment(policy, fill=[fill] * 3)] if augment == "autoaugment" else []
        crop = [transforms.RandomCrop(32, settings.pad, fill=fill), transforms.RandomHorizontalFlip()]
        scale = [transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)]
        self.transform = transforms.Compose([*crop, *auto, *scale])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image (3, 32, 32) and its label."""
        image = self.transform(Image.fromarray(self.split.images[index]))
        if self.cutout:
            half = self.settings.cutout_length // 2
            y, x = torch.randint(32, (2,)).tolist()
            image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0.0
        return image, int(self.split.labels[index])


def measure() -> Iterator[list[Row]]:
    """Compare the images a second of an epoch, for each augmentation, without workers and with two that live on."""
    data = load_images(BUNDLED)
    indices = np.arange(IMAGES) % len(data.train)
    split = ImageSplit(data.train.images[indices], data.train.labels[indices])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for augment, workers in product(AUGMENTATIONS, (0, 2)):
            load = partial(
                DataLoader, batch_size=BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0
            )
            ours = load(ImageBatches(split, data.settings, augment), collate_fn=collate)
            theirs = load(PerImage(split, data.settings, augment))
            ways: Ways = {
                "ImageBatches": (repeat(partial(deque, ours, maxlen=0)), "image by image"),
                "image by image": (repeat(partial(deque, theirs, maxlen=0)), None),
            }
            case = f"{augment}, batch {BATCH_SIZE}, {workers} workers"
            yield compare("Input pipeline", case, ways, "images/s", IMAGES, rounds=(ROUNDS, ROUNDS))
    finally:
        torch.set_num_threads(threads)
