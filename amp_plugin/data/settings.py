"""The known data sets, and how the AMP paper normalises and augments them.

Source: Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation"
(https://arxiv.org/abs/2010.04925) and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class DatasetSettings:
    """How the images of one data set are normalised and augmented.

    Attributes:
        mean: means of the channels, of pixels scaled to [0, 1].
        std: standard deviations of the channels, of pixels scaled to [0, 1].
        pad: pixels added on every side before the random crop, by default 4; 0 for no crop.
        fill: grey level (0 to 255) of the padding and of the pixels that AutoAugment moves into the image.
        flip: whether a random half of the images is mirrored.
        cutout_length: side of Cutout's square, in pixels.
        autoaugment: name of torchvision's AutoAugment policy: cifar10, svhn or imagenet.
        autoaugment_crop: whether images are cropped also where AutoAugment is on.

    Raises:
        ValueError: a value is out of range.
    """

    mean: Channels
    std: Channels
    pad: int = 4
    fill: int = 128
    flip: bool = True
    cutout_length: int = 16
    autoaugment: str = "cifar10"
    autoaugment_crop: bool = True

    def __post_init__(self) -> None:
        if not all(0 <= m <= 1 for m in self.mean):
            raise ValueError(f"mean must lie in [0, 1] (pixels scaled to [0, 1]), got {self.mean}")
        if not all(0 < s <= 1 for s in self.std):
            raise ValueError(f"std must lie in (0, 1] (pixels scaled to [0, 1]), got {self.std}")
        if self.pad < 0:
            raise ValueError(f"pad must not be negative, got {self.pad}")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill must be a grey level from 0 to 255, got {self.fill}")
        if self.cutout_length < 1:
            raise ValueError(f"cutout_length must be positive, got {self.cutout_length}")


@dataclass(frozen=True)
class DatasetSource:
    """Arguments for `datasets.load_dataset`, columns, and the paper's settings where it has the data set."""

    path: str
    config_name: str | None
    image_column: str
    label_column: str
    settings: DatasetSettings | None = None


def measured_settings(images: npt.NDArray[np.uint8]) -> DatasetSettings:
    """Choose settings for a data set that the paper does not have.

    The training images (N, H, W, 3) give the statistics, and Cutout's square is half the shorter side, as on CIFAR-10.
    A channel that is the same everywhere is shifted to 0 and not scaled. All other settings are the defaults.

    Raises:
        ValueError: All channels are the same everywhere.
    """
    total, squares = np.zeros(3), np.zeros(3)
    varies = (images != images[:1, :1, :1]).any(axis=(0, 1, 2))
    if not varies.any():
        raise ValueError("all training images are of one and the same colour, which tells no classes apart")
    for start in range(0, len(images), 1024):
        pixels = images[start : start + 1024].reshape(-1, 3).astype(np.float64)
        total += pixels.sum(axis=0)
        squares += np.square(pixels).sum(axis=0)
    count = images.size // 3
    mean = total / count
    std = np.where(varies, np.sqrt(np.maximum(squares / count - np.square(mean), 0.0)), 255.0)
    return DatasetSettings(_scaled(*mean), _scaled(*std), cutout_length=max(1, min(images.shape[1:3]) // 2))


def _scaled(red: float, green: float, blue: float) -> Channels:
    return red / 255, green / 255, blue / 255


_CIFAR10 = DatasetSettings(_scaled(125.3, 123.0, 113.9), _scaled(63.0, 62.1, 66.7))
_CIFAR100 = DatasetSettings(_scaled(129.3, 124.1, 112.4), _scaled(68.2, 65.4, 70.4), cutout_length=8)
_SVHN = DatasetSettings(
    _scaled(109.9, 109.7, 113.8),
    _scaled(50.1, 50.6, 50.8),
    pad=2,
    flip=False,
    cutout_length=20,
    autoaugment="svhn",
    autoaugment_crop=False,
)

BUNDLED = "cifar10_sample"
SOURCES = {
    "cifar10": DatasetSource("uoft-cs/cifar10", None, "img", "label", _CIFAR10),
    "cifar100": DatasetSource("uoft-cs/cifar100", None, "img", "fine_label", _CIFAR100),
    "svhn": DatasetSource("ufldl-stanford/svhn", "cropped_digits", "image", "label", _SVHN),
    BUNDLED: DatasetSource(str(Path(__file__).parent / "sample" / "cifar10"), None, "img", "label", _CIFAR10),
}
