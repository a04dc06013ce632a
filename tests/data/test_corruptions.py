"""Test corrupted images against closed forms."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from amp_plugin.data import load_images
from amp_plugin.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt

ALL = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
DEVIATIONS = dict(zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True))
BLURS = dict(zip(SEVERITIES, (0.4, 0.6, 0.7, 0.8, 1.0), strict=True))
FACTORS = dict(zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15), strict=True))
QUALITIES = dict(zip(SEVERITIES, (80, 65, 58, 50, 40), strict=True))


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.array(load_images("cifar10_sample").test.images[:60])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_noise_is_gaussian_of_the_published_deviation(severity: int) -> None:
    """On mid-grey nothing is clipped; cutting fractions off takes half a level, and adds the variance of a fraction."""
    noise = corrupt(np.full((400, 32, 32, 3), 128, np.uint8), "gaussian_noise", severity) - 128.0 + 0.5
    deviation = (np.square(255 * DEVIATIONS[severity]) + 1 / 12) ** 0.5
    count = noise.size
    assert abs(noise.mean()) < 4 * deviation / count**0.5
    assert abs(noise.std() - deviation) < 4 * deviation / (2 * count) ** 0.5
    within = (np.abs(noise) < deviation).mean()
    assert within == pytest.approx(0.6827, abs=0.06), "as a normal distribution has, but for whole levels"
    for one, other in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1]), (noise[..., 0], noise[..., 1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / one.size**0.5, "each value is drawn for itself"


def test_noise_is_clipped_at_black_and_white() -> None:
    black, white = (corrupt(np.full((9, 32, 32, 3), level, np.uint8), "gaussian_noise", 5) for level in (0, 255))
    assert (black == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert (white == 255).mean() < 0.55
    assert black.max() < 150 < white.min() + 50


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_blur_of_an_impulse_is_the_gaussian_at_the_pixels(severity: int) -> None:
    image = np.zeros((1, 33, 35, 3), np.uint8)
    image[0, 16, 17, 1] = 255
    rows, columns = np.arange(33)[:, None] - 16, np.arange(35)[None] - 17
    gaussian = np.exp(-(rows**2 + columns**2) / (2 * BLURS[severity] ** 2))
    blurred = corrupt(image, "gaussian_blur", severity)
    np.testing.assert_array_equal(blurred[0, :, :, 1], np.floor(255 * gaussian / gaussian.sum()))
    assert not blurred[..., [0, 2]].any(), "channels stay apart"


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_blur_repeats_the_edge(severity: int) -> None:
    """A white edge goes on without end, so a column has the share of all that are as far to its left, or more."""
    image = np.zeros((1, 8, 20, 3), np.uint8)
    image[:, :, 0] = 255
    gaussian = np.exp(-(np.arange(-30, 31) ** 2) / (2 * BLURS[severity] ** 2))
    shares = [gaussian[30 + column :].sum() / gaussian.sum() for column in range(20)]
    blurred = corrupt(image, "gaussian_blur", severity)
    assert (blurred == blurred[:, :1]).all(), "nothing changes along the edge"
    np.testing.assert_allclose(blurred[0, 0, :, 1], np.floor(255 * np.array(shares)), atol=1)
    for level in (0, 7, 128, 254, 255):
        flat = np.full((1, 5, 6, 3), level, np.uint8)
        np.testing.assert_array_equal(corrupt(flat, "gaussian_blur", severity), flat)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_the_means_and_scales_the_deviations(severity: int, photos: np.ndarray) -> None:
    flat = corrupt(photos, "contrast", severity).astype(float)
    mean, now = (images.mean(axis=(1, 2), keepdims=True) for images in (photos, flat))
    assert (np.abs(mean - 0.5 - now) < 0.5).all(), "half a level is cut off on average"
    expected = mean + FACTORS[severity] * (photos - mean)
    assert ((expected - flat > -1e-5) & (expected - flat < 1 + 1e-5)).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_what_pillow_makes(severity: int, photos: np.ndarray) -> None:
    for image, corrupted in zip(photos, corrupt(photos, "jpeg_compression", severity), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=QUALITIES[severity])
        np.testing.assert_array_equal(corrupted, np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows_and_nothing_else_changes(name: str, photos: np.ndarray) -> None:
    before = photos.copy()
    found = [corrupt(photos, name, severity) for severity in SEVERITIES]
    distances = [np.abs(some.astype(float) - photos).mean() for some in found]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert all(some.dtype == np.uint8 and some.shape == photos.shape for some in found)
    assert (photos == before).all()


def shares(images: np.ndarray) -> Iterator[np.ndarray]:
    yield images[:7]
    read_only = images[:]
    read_only.flags.writeable = False
    yield read_only


@pytest.mark.parametrize(("name", "severity"), ALL)
def test_an_image_is_corrupted_alike_in_every_call(
    name: str, severity: int, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the images after it, nor how many are worked on at a time, nor other random numbers matter."""
    whole = corrupt(photos, name, severity)
    np.random.default_rng(1).normal()
    for some in shares(photos):
        np.testing.assert_array_equal(corrupt(some, name, severity), whole[: len(some)])
    monkeypatch.setattr("amp_plugin.data.corruptions._CHUNK", 5 * photos[0].size)
    np.testing.assert_array_equal(corrupt(photos, name, severity), whole)


def test_noise_differs_from_severity_to_severity() -> None:
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    one, other = (corrupt(grey, "gaussian_noise", severity) - 128.0 for severity in (1, 2))
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05
