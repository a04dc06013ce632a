"""Corrupt images as CIFAR-10-C does: Gaussian noise, Gaussian blur, less contrast, and JPEG, at five severities.

The parameters are those of CIFAR-10-C, for images of 32x32 pixels, and as there a pixel's fraction is cut off. Source:
Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
https://arxiv.org/abs/1903.12261, and ``make_cifar_c.py`` of https://github.com/hendrycks/robustness.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

Images = npt.NDArray[np.uint8]  # (N, H, W, 3)
Pixels = npt.NDArray[np.float64]  # the same shape, on the scale from 0 to 255, but not only whole numbers
Random = np.random.RandomState  # whose numbers never change, unlike those of NumPy's newer generators (NEP 19)

SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 2**20  # about so many values are corrupted at a time
_ROUNDING = 1e-6  # what arithmetic may take from a whole number, which is not to cost the number a grey level


def corrupt(images: Images, corruption: str, severity: int) -> Images:
    """Return corrupted copies of images.

    Each call adds the same noise to the image in one place, if the images are of one size.

    Args:
        images: uint8 (N, H, W, 3).
        corruption: one of `CORRUPTIONS`.
        severity: one of `SEVERITIES`.
    """
    kind = CORRUPTIONS[corruption]
    parameter = kind.parameters[SEVERITIES.index(severity)]
    random = Random([zlib.crc32(corruption.encode()), severity])
    corrupted = np.empty(images.shape, np.uint8)
    count = max(1, _CHUNK // (images.size // len(images)))
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        pixels = kind.corrupt(images[part], parameter, random)
        corrupted[part] = np.clip(pixels, 0, 255) + _ROUNDING
    return corrupted


def gaussian_noise(images: Images, deviation: float, random: Random) -> Pixels:
    """Add independent noise of a standard deviation, which is a fraction of the range of a pixel."""
    return images + 255 * deviation * random.standard_normal(images.shape)


def gaussian_blur(images: Images, deviation: float, random: Random) -> Pixels:
    """Convolve each channel with a Gaussian of a standard deviation in pixels; pixels at the edge go on beyond it."""
    radius = int(4 * deviation + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    weights /= weights.sum()
    pixels: Pixels = np.pad(images, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="edge").astype(float)
    for axis in (1, 2):
        pixels = sliding_window_view(pixels, len(weights), axis) @ weights
    return pixels


def contrast(images: Images, factor: float, random: Random) -> Pixels:
    """Multiply the deviations from the mean of each channel of an image."""
    mean: Pixels = images.mean(axis=(1, 2), keepdims=True)
    return mean + factor * (images - mean)


def jpeg_compression(images: Images, quality: float, random: Random) -> Pixels:
    """Write each image as JPEG, as Pillow does by default, and read it."""
    read = np.empty(images.shape)
    for place, image in enumerate(images):
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=int(quality))
            read[place] = np.asarray(Image.open(file))
    return read


class Corruption(NamedTuple):
    """A way to corrupt images: its name for the reader, and its parameter at each of the severities."""

    name: str
    corrupt: Callable[[Images, float, Random], Pixels]
    parameters: tuple[float, ...]


CORRUPTIONS = {
    "gaussian_noise": Corruption("Gaussian noise", gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": Corruption("Gaussian blur", gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": Corruption("contrast", contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg_compression": Corruption("JPEG compression", jpeg_compression, (80, 65, 58, 50, 40)),
}
