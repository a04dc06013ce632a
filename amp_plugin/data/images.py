"""Decoded images with their labels, and class-balanced parts of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amp_plugin.data.draws import SELECTION_STREAM, uniform_draws
from amp_plugin.data.settings import DatasetSettings


class DatasetError(ValueError):
    """A data set cannot be used; the message names it and says what to do."""


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, H, W, 3), RGB; from `load_images` a read-only memory map.
        labels: int64 (N,).

    Raises:
        ValueError: other shapes or types.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            got = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {got}")
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            got = f"{self.labels.dtype} {self.labels.shape}"
            raise ValueError(f"labels must be int64 ({len(self.images)},), one an image, got {got}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, n: int, seed: int = 0) -> ImageSplit:
        """Take ``n`` random images, equally many of every class (give or take one), in their present order.

        Raises:
            DatasetError: there are too few images of some class.
        """
        return self._take(self._balanced(n, seed)[:n])

    def split(self, n: int, seed: int = 0) -> tuple[ImageSplit, ImageSplit]:
        """Hold out what ``subset(n, seed)`` takes, for validation.

        Returns:
            The other images and the held-out ones, disjoint.

        Raises:
            DatasetError: there are too few images of some class, or none would be left.
        """
        if n == len(self):
            raise DatasetError(f"holding out all {n} images leaves none to train on; hold out fewer")
        order = self._balanced(n, seed)
        return self._take(order[n:]), self._take(order[:n])

    def _balanced(self, n: int, seed: int) -> npt.NDArray[np.intp]:
        """All indices in a random order, of which the first ``n`` hold the classes equally often."""
        if not 0 < n <= len(self):
            raise DatasetError(f"cannot take {n} of {len(self)} images; ask for 1 to {len(self)}")
        chance = uniform_draws(seed, SELECTION_STREAM, len(self), 1)[:, 0]
        shuffled = np.lexsort((chance, self.labels))  # class by class, each class shuffled
        of_class = self.labels[shuffled]
        turn = np.arange(len(self)) - np.searchsorted(of_class, of_class)  # place within its class
        order = shuffled[np.lexsort((chance[shuffled], turn))]
        classes, available = np.unique(self.labels, return_counts=True)
        each = n // len(classes)
        scarce = int(np.argmin(available))
        if available[scarce] < each or np.minimum(available, each + 1).sum() < n:
            raise DatasetError(
                f"a class-balanced choice of {n} images needs {n / len(classes):g} of every class, but class"
                f" {classes[scarce]} has only {available[scarce]}; ask for at most"
                f" {available[scarce] * len(classes)}"
            )
        return order

    def _take(self, indices: npt.NDArray[np.intp]) -> ImageSplit:
        kept = np.sort(indices)
        return ImageSplit(self.images[kept], self.labels[kept])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set as `load_images` gives it."""

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    settings: DatasetSettings

    @property
    def num_classes(self) -> int:
        """Number of classes; labels lie in [0, num_classes)."""
        return len(self.class_names)
