from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from amp_plugin.data import DatasetSettings, load_images
from amp_plugin.data.augment import DRAWS, Augmenter, cutout, random_crop, random_flip
from amp_plugin.data.autoaugment import BatchAutoAugment, _recolour
from amp_plugin.data.draws import uniform_draws
from amp_plugin.data.settings import SOURCES

SETTINGS = DatasetSettings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
CIFAR10, SVHN = (SOURCES[name].settings for name in ("cifar10", "svhn"))
NEVER = np.nextafter(1.0, 0.0)  # this draw is at or above any probability in these policies
UNLIKELY = 1e-3  # draws are seeded, so a test always passes or never does


def uniform(n: int, columns: int = DRAWS, stream: int = 0) -> np.ndarray:
    return uniform_draws(0, stream, n, columns)


def random_images(n: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Make images (n, H, W, 3) of differing contrast, so that every operation changes them; the last one is flat."""
    rng = np.random.default_rng(seed)
    low, high = rng.integers(0, 100, (n, 1, 1, 1)), rng.integers(130, 257, (n, 1, 1, 1))
    images = rng.integers(low, high, (n, height, width, 3)).astype(np.uint8)
    images[-1] = 77
    return images


def planes(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def same_distribution(ours: Any, theirs: Any) -> float:
    """Return the p-value of the hypothesis that two samples of categories come from one distribution."""
    counts = Counter(ours), Counter(theirs)
    categories = sorted(counts[0] | counts[1])
    return float(stats.chi2_contingency([[count[c] for c in categories] for count in counts]).pvalue)


def equally_likely(sample: Any, categories: int) -> float:
    counts = np.bincount(np.asarray(sample), minlength=categories)
    assert len(counts) == categories
    return float(stats.chisquare(counts).pvalue)


# --- random numbers -----------------------------------------------------------------------------------------


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = uniform(20_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert all(stats.kstest(column, "uniform").pvalue > UNLIKELY for column in draws.T)
    correlation = np.corrcoef(np.hstack([draws[:-1], draws[1:], uniform(19_999, stream=1)]).T)
    assert np.abs(correlation - np.eye(3 * DRAWS)).max() < 5 / np.sqrt(20_000)


def test_a_row_depends_on_seed_stream_and_sample_alone() -> None:
    draws = uniform_draws(3, 5, 101, 7)
    np.testing.assert_array_equal(draws[:40], uniform_draws(3, 5, 40, 7))
    for seed, stream in ((4, 5), (3, 6), (5, 3), (3 + 2**32, 5), (3, 5 + 2**63)):
        assert not np.isin(draws, uniform_draws(seed, stream, 101, 7)).any()


@pytest.mark.parametrize(("seed", "stream", "name"), [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "stream")])
def test_draws_outside_the_counter(seed: int, stream: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 2\*\*64\), got {seed or stream}"):
        uniform_draws(seed, stream, 3, 3)


# --- crop and flip ------------------------------------------------------------------------------------------


def coordinates(n: int, side: int) -> np.ndarray:
    """Make n images (3, side, side) whose pixels say where they are: row + 1, column + 1, 0."""
    row, column = np.mgrid[1 : side + 1, 1 : side + 1]
    return np.repeat(np.stack([row, column, 0 * row])[None].astype(np.uint8), n, axis=0)


def test_crop_takes_every_window_and_fills_the_rest() -> None:
    images = planes(random_images(25, 6, 7))
    offsets = np.array(list(itertools.product(range(5), repeat=2)))
    cropped = random_crop(images, (offsets + 0.5) / 5, pad=2, fill=9)
    for image, crop, (top, left) in zip(images, cropped, offsets, strict=True):
        padded = transforms.functional.pad(torch.from_numpy(image), [2, 2, 2, 2], fill=9)
        expected = transforms.functional.crop(padded, top, left, 6, 7)
        np.testing.assert_array_equal(crop, expected)


def test_crop_offsets_are_distributed_as_torchvisions() -> None:
    image = coordinates(1, 12)[0]
    reference = transforms.RandomCrop(12, padding=4, fill=128)
    # The middle pixel is never padding: it tells the offset.
    theirs = [tuple(reference(torch.from_numpy(image))[:2, 6, 6].tolist()) for _ in range(3000)]
    ours = random_crop(coordinates(3000, 12), uniform(3000)[:, :2], 4, 128)[:, :2, 6, 6]
    assert len(set(theirs)) == 81
    assert same_distribution(map(tuple, ours.tolist()), theirs) > UNLIKELY


def test_flip_mirrors_the_chosen_half() -> None:
    images = planes(random_images(6))
    before = images.copy()
    flipped = random_flip(images, np.array([0.0, 0.4999, 0.5, 0.9, 0.2, 0.7]))
    chosen = [0, 1, 4]
    np.testing.assert_array_equal(flipped[chosen], images[chosen][..., ::-1])
    np.testing.assert_array_equal(flipped[[2, 3, 5]], images[[2, 3, 5]])
    np.testing.assert_array_equal(images, before)


# --- Cutout -------------------------------------------------------------------------------------------------


def devries_taylor(side: int, length: int, y: int, x: int) -> np.ndarray:
    """Mark the pixels that the published Cutout (even lengths) blackens around a centre."""
    black = np.zeros((side, side), dtype=bool)
    half = length // 2
    black[max(0, y - half) : min(side, y + half), max(0, x - half) : min(side, x + half)] = True
    return black


@pytest.mark.parametrize("length", [2, 6, 20])
def test_cutout_blackens_the_published_square_around_every_centre(length: int) -> None:
    centres = np.array(list(itertools.product(range(9), repeat=2)))
    holes = cutout(np.full((81, 3, 9, 9), 255, np.uint8), (centres + 0.5) / 9, length)
    for hole, (y, x) in zip(holes, centres, strict=True):
        np.testing.assert_array_equal(hole, np.where(devries_taylor(9, length, y, x), 0, 255)[None].repeat(3, 0))


def test_cutout_of_an_odd_length_has_it() -> None:
    hole = cutout(np.full((1, 3, 9, 9), 255, np.uint8), np.array([[0.5, 0.5]]), 5)
    assert (hole == 0).sum() == 3 * 25


def test_cutout_centres_and_areas_are_distributed_as_published() -> None:
    side, length, n = 8, 4, 6400
    holes = cutout(np.full((n, 1, side, side), 255, np.uint8), uniform(n)[:, 3:5], length)[:, 0] == 0
    published = {
        devries_taylor(side, length, y, x).tobytes(): number
        for number, (y, x) in enumerate(itertools.product(range(side), repeat=2))
    }
    assert len(published) == side * side  # a hole tells its centre
    assert equally_likely([published[hole.tobytes()] for hole in holes], side * side) > UNLIKELY
    areas = [devries_taylor(side, length, y, x).sum() for y, x in itertools.product(range(side), repeat=2)]
    assert holes.sum(axis=(1, 2)).mean() == pytest.approx(np.mean(areas), rel=0.02)


# --- AutoAugment --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return load_images("cifar10_sample", cache_dir=tmp_path_factory.mktemp("sample")).test.images


@pytest.mark.parametrize("policy", ["cifar10", "svhn"])
@pytest.mark.parametrize("size", [(32, 32), (20, 27)])
def test_each_operation_equals_torchvisions(policy: str, size: tuple[int, int], photographs: np.ndarray) -> None:
    ours = BatchAutoAugment(policy, size, fill=128)
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy(policy))
    space = theirs._augmentation_space(10, size)
    images = torch.from_numpy(planes(np.concatenate([photographs[:6, : size[0], : size[1]], random_images(3, *size)])))
    n = len(images)
    checked = set()
    for number, pair in enumerate(theirs.policies):
        for step, sign in itertools.product(range(2), range(2)):
            name, probability, bin_ = pair[step]
            magnitude = 0.0 if bin_ is None else float(space[name][0][bin_])
            magnitude *= -1.0 if space[name][1] and sign == 0 else 1.0
            if probability == 0 or (name, magnitude) in checked:
                continue
            checked.add((name, magnitude))
            probs = np.full((n, 2), NEVER)
            probs[:, step] = 0.0
            numbers, signs = np.full(n, number), np.full((n, 2), 1 - sign)
            signs[:, step] = sign
            batch = ours(images, numbers, probs, signs)
            for image, augmented in zip(images, batch, strict=True):
                expected = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, [128.0] * 3)
                assert torch.equal(augmented, expected), (name, magnitude)
    assert {name for name, _ in checked} == {name for pair in theirs.policies for name, p, _ in pair if p > 0}


@pytest.mark.parametrize("name", ["Brightness", "Color", "Sharpness"])
@pytest.mark.parametrize("size", [(32, 32), (2, 5)])
def test_a_mixture_at_many_magnitudes_at_once_equals_torchvisions(name: str, size: tuple[int, int]) -> None:
    magnitudes = np.concatenate([sign * np.linspace(0.0, 0.9, 10) for sign in (-1, 1)])
    images = torch.from_numpy(planes(random_images(len(magnitudes), *size)))
    batch = _recolour(images, name, magnitudes)
    for image, augmented, magnitude in zip(images, batch, magnitudes.tolist(), strict=True):
        assert torch.equal(augmented, _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)), magnitude


@pytest.mark.parametrize("policy", ["cifar10", "svhn", "imagenet"])
def test_a_mixed_batch_equals_torchvision_image_by_image(
    policy: str, photographs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.from_numpy(planes(photographs[:200]))
    before = images.clone()
    ours = BatchAutoAugment(policy, (32, 32), fill=128)
    draws = uniform(len(images), 5)
    numbers, probs = (draws[:, 0] * ours.num_sub_policies).astype(int), draws[:, 1:3]
    signs = (draws[:, 3:] * 2).astype(int)
    batch = ours(images, numbers, probs, signs)

    parameters = iter(zip(numbers.tolist(), torch.from_numpy(probs), torch.from_numpy(signs), strict=True))
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy(policy), fill=128)
    monkeypatch.setattr(theirs, "get_params", lambda transform_num: next(parameters))
    for image, augmented in zip(images, batch, strict=True):
        assert torch.equal(augmented, theirs(image))
    assert torch.equal(images, before)
    assert 0.5 < (batch != images).flatten(1).any(dim=1).float().mean() < 1


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="policy 'cifar' is unknown; use one of imagenet, cifar10, svhn"):
        BatchAutoAugment("cifar", (32, 32))


# --- the whole --------------------------------------------------------------------------------------------


def torchvision_normalized(images: np.ndarray, settings: DatasetSettings) -> torch.Tensor:
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)])
    return torch.stack([convert(Image.fromarray(image)) for image in images])


def test_no_augmentation_is_torchvisions_normalisation() -> None:
    images = random_images(5, 9, 12)
    batch = Augmenter(SETTINGS, "none", (9, 12))(images, uniform(5))
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    torch.testing.assert_close(batch, torchvision_normalized(images, SETTINGS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("augment", ["none", "plain", "cutout", "autoaugment"])
def test_channels_last_is_the_same_batch(augment: Any) -> None:
    images, draws = random_images(7), uniform(7)
    plain = Augmenter(CIFAR10, augment, (32, 32))(images, draws)
    last = Augmenter(CIFAR10, augment, (32, 32), channels_last=True)(images, draws)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_cutout_writes_black_before_normalisation() -> None:
    batch = Augmenter(SETTINGS, "cutout", (32, 32))(np.full((64, 32, 32, 3), 200, np.uint8), uniform(64))
    mean, std = torch.tensor(SETTINGS.mean), torch.tensor(SETTINGS.std)
    levels = [(level / 255 - mean) / std for level in (0, 128, 200)]  # the levels of hole, padding and image
    nearest = torch.stack([(batch.movedim(1, 3) - level).abs().amax(dim=3) for level in levels]).min(dim=0)
    assert nearest.values.max() < 1e-5
    shares = torch.bincount(nearest.indices.flatten(), minlength=3) / nearest.indices.numel()
    assert 0.1 < shares[0] < 0.25
    assert shares[1] > 0.05


def undone(batch: torch.Tensor, settings: DatasetSettings) -> np.ndarray:
    """Return the bytes (B, 3, H, W) that were normalised into a batch."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return ((batch * std + mean) * 255).round().to(torch.uint8).numpy()


def test_modes_build_on_one_another() -> None:
    images, draws = random_images(40), uniform(40)
    bytes_of = {
        mode: undone(Augmenter(CIFAR10, mode, (32, 32))(images, draws), CIFAR10)
        for mode in ("none", "plain", "cutout", "autoaugment")
    }
    np.testing.assert_array_equal(bytes_of["none"], planes(images))
    plain = random_flip(random_crop(planes(images), draws[:, :2], 4, 128), draws[:, 2])
    np.testing.assert_array_equal(bytes_of["plain"], plain)
    np.testing.assert_array_equal(bytes_of["cutout"], cutout(plain, draws[:, 3:5], 16))
    holes = (bytes_of["cutout"] == 0) & (plain != 0)
    assert (bytes_of["autoaugment"][holes] == 0).all()  # Cutout comes last
    draws[:, 6:8] = NEVER
    without = Augmenter(CIFAR10, "autoaugment", (32, 32))(images, draws)
    np.testing.assert_array_equal(undone(without, CIFAR10), bytes_of["cutout"])


def test_svhn_crops_by_two_does_not_flip_and_autoaugment_replaces_the_crop() -> None:
    images, draws = random_images(40), uniform(40)
    plain = undone(Augmenter(SVHN, "plain", (32, 32))(images, draws), SVHN)
    np.testing.assert_array_equal(plain, random_crop(planes(images), draws[:, :2], 2, 128))
    draws[:, 6:8] = NEVER
    augmented = undone(Augmenter(SVHN, "autoaugment", (32, 32))(images, draws), SVHN)
    np.testing.assert_array_equal(augmented, cutout(planes(images), draws[:, 3:5], 20))


def test_no_padding_is_no_crop() -> None:
    images, draws = random_images(9), uniform(9)
    batch = Augmenter(replace(SETTINGS, pad=0, flip=False), "plain", (32, 32))(images, draws)
    np.testing.assert_array_equal(undone(batch, SETTINGS), planes(images))


def test_sub_policies_signs_and_flips_are_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 5000
    seen: list[Any] = []

    def spy(self: BatchAutoAugment, images: torch.Tensor, *random_numbers: Any) -> torch.Tensor:
        seen.extend([images, *random_numbers])
        return images

    monkeypatch.setattr(BatchAutoAugment, "__call__", spy)
    settings = replace(SETTINGS, pad=0)
    Augmenter(settings, "autoaugment", (4, 4))(coordinates(n, 4).transpose(0, 2, 3, 1), uniform(n))
    images, numbers, probs, signs = seen
    assert equally_likely(numbers, 25) > UNLIKELY
    assert equally_likely(signs[:, 0] * 2 + signs[:, 1], 4) > UNLIKELY
    assert all(stats.kstest(column, "uniform").pvalue > UNLIKELY for column in probs.T)
    flipped = (images[:, 1, 0, 0] == 4).numpy()
    assert equally_likely(flipped, 2) > UNLIKELY
    assert stats.chi2_contingency(np.histogram2d(flipped, numbers, (2, 25))[0]).pvalue > UNLIKELY


def test_unknown_augmentation() -> None:
    with pytest.raises(ValueError, match="augment must be one of none, plain, cutout, autoaugment, got 'mixup'"):
        Augmenter(SETTINGS, "mixup", (32, 32))  # type: ignore[arg-type]
