"""Decoded images with their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from amp_plugin.data.settings import DatasetSettings
from amp_plugin.data.splits import LabelledSplit


@dataclass(frozen=True, eq=False)
class ImageSplit(LabelledSplit):
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, H, W, 3), RGB; from `load_images` a read-only memory map.
        labels: int64 (N,).

    Raises:
        ValueError: other shapes or types.
    """

    kind: ClassVar[str] = "images"
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            got = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {got}")
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            got = f"{self.labels.dtype} {self.labels.shape}"
            raise ValueError(f"labels must be int64 ({len(self.images)},), one an image, got {got}")

    def _take(self, indices: npt.NDArray[np.intp]) -> ImageSplit:
        return ImageSplit(self.images[indices], self.labels[indices])


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
