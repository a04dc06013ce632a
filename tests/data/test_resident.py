"""Batches that the device makes are those of the CPU, to the bit; without a GPU that device is a CPU, or a fake."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.counting import CountCalls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset
from torch.utils.data._utils.pin_memory import pin_memory

from amp_plugin.data import DatasetSettings, ImageBatches, ImageSplit, collate
from amp_plugin.data.settings import SOURCES
from amp_plugin.train.methods.mixup import MixedBatches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, CLASSES = 250, 10
CIFAR10, SVHN = (SOURCES[name].settings for name in ("cifar10", "svhn"))
assert CIFAR10 is not None
assert SVHN is not None
SETTINGS = {
    "cifar10": CIFAR10,
    "svhn": SVHN,
    "imagenet policy": replace(CIFAR10, autoaugment="imagenet", fill=0),
    "odd cutout": replace(CIFAR10, cutout_length=7, pad=1),
    "no crop": replace(CIFAR10, pad=0),
    "cutout of all": replace(SVHN, cutout_length=200, pad=9),
}
ALL = pytest.mark.parametrize("augment", ["none", "plain", "cutout", "autoaugment"])


def split_of(height: int = 32, width: int = 32) -> ImageSplit:
    """Make images of differing contrast, some of which have channels of one level or of two."""
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 100, (N, 1, 1, 3)), rng.integers(130, 257, (N, 1, 1, 3))
    images = rng.integers(low, high, (N, height, width, 3)).astype(np.uint8)
    images[::10, ..., 1], images[1::10, :, 1:] = 77, 200
    return ImageSplit(images, rng.integers(CLASSES, size=N))


def both(
    augment: Any, settings: DatasetSettings = CIFAR10, split: ImageSplit | None = None, **kwargs: Any
) -> tuple[ImageBatches, ImageBatches]:
    """Return a data set on the host, and the same one on the device."""
    split = split or split_of()
    here, there = (ImageBatches(split, settings, augment, **kwargs) for _ in range(2))
    return here, there.to(DEVICE)


def assert_same(here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    """Compare a batch of the host with one of the device."""
    assert list(here) == list(there)
    for name, value in here.items():
        assert there[name].device.type == DEVICE
        other = there[name].cpu()
        assert (value.dtype, value.shape) == (other.dtype, other.shape)
        if value.dim() == 4:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                assert value.is_contiguous(memory_format=memory_format) == other.is_contiguous(
                    memory_format=memory_format
                )
        assert torch.equal(value, other)


# --- the same bits ------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting(name: str, augment: Any) -> None:
    here, there = both(augment, SETTINGS[name], seed=4)
    assert there.device_batch is not None
    assert_same(here.__getitems__(range(N)), there.__getitems__(range(N)))


@ALL
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(20, 27), (27, 20), (2, 5), (1, 1)])
def test_every_size_and_memory_format(size: tuple[int, int], channels_last: bool, augment: Any) -> None:
    here, there = both(augment, split=split_of(*size), channels_last=channels_last)
    assert_same(here.__getitems__(range(N)), there.__getitems__(range(N)))


@ALL
def test_every_epoch_and_seed(augment: Any) -> None:
    for seed in (0, 2**64 - 1):
        here, there = both(augment, seed=seed)
        for epoch in (0, 7, 2**40, 0):
            here.set_epoch(epoch)
            there.set_epoch(epoch)
            assert_same(here.__getitems__(range(50)), there.__getitems__(range(50)))


@ALL
def test_every_choice_of_images(augment: Any) -> None:
    here, there = both(augment)
    for indices in ([3], [7, 7, 0, 7], [-1, 5, -N], np.random.default_rng(0).permutation(N)[:53]):
        assert_same(here.__getitems__(indices), there.__getitems__(indices))
    assert_same(here[11], there[11])
    for dataset in (here, there):
        for outside in (N, -N - 1, 2**40):
            with pytest.raises(IndexError):
                dataset.__getitems__([0, outside])
    parts = (DataLoader(Subset(dataset, [50, 2, 31]), batch_size=2, collate_fn=collate) for dataset in (here, there))
    for ours, theirs in zip(*parts, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_mixup(channels_last: bool) -> None:
    here, there = (
        MixedBatches(split_of(), CIFAR10, "cutout", seed=3, alpha=0.8, classes=CLASSES, channels_last=channels_last)
        for _ in range(2)
    )
    there.to(DEVICE)
    for epoch, indices in ((0, range(50)), (1, [5, 9, 5])):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        assert_same(here.__getitems__(indices), there.__getitems__(indices))


def test_mixup_leaves_the_generators_of_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    MixedBatches(split_of(), CIFAR10, alpha=0.8, classes=CLASSES).__getitems__(range(4))
    assert seeded == []


# --- what it asks of host and device ------------------------------------------------------------------------


@pytest.mark.parametrize(("augment", "kernels"), [("none", 4), ("plain", 7), ("cutout", 12), ("autoaugment", 160)])
def test_few_kernels_and_no_wait(augment: Any, kernels: int) -> None:
    _, there = both(augment)
    table = table_of(there, range(50))
    assert there.device_batch is not None
    with CountCalls() as counted:
        there.device_batch(table)
    assert counted.launches <= kernels
    assert counted.syncs == {}


def table_of(dataset: ImageBatches, indices: Any) -> Tensor:
    """Return the table that a data set hands to the device."""
    seen: list[Tensor] = []
    make = dataset.device_batch
    assert make is not None
    dataset.device_batch = lambda table: (seen.append(table), make(table))[1]  # type: ignore[func-returns-value]
    dataset.__getitems__(indices)
    dataset.device_batch = make
    return seen[0]


def recording(dataset: ImageBatches) -> Any:
    """Return the operators that made a batch of 60, to be made again with the numbers of another table."""
    make = dataset.device_batch
    assert make is not None
    return make_fx(lambda table: make(table))(table_of(dataset, range(60)))


@ALL
def test_operators_that_were_recorded_make_the_next_batch(augment: Any) -> None:
    """This is what a CUDA graph does: the operators are those of the first table, with the numbers of another."""
    here, there = both(augment)
    recorded = recording(there)
    for dataset in (here, there):
        dataset.set_epoch(1)
    indices = [*range(200, 250), *range(10)]
    expected = here.__getitems__(indices)
    pixels, labels = recorded(table_of(there, indices))
    assert_same(expected, {"pixel_values": pixels, "labels": labels})


class Devices(TorchDispatchMode):
    """Notes on which devices the operands of operators lie."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


@ALL
def test_a_gpu_makes_the_batch_of_what_lies_on_it(augment: Any) -> None:
    dataset = ImageBatches(split_of(20, 27), CIFAR10, augment, channels_last=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dataset.to("cuda")
        assert dataset.device_batch is not None
        with Devices() as devices:
            pixels, labels = dataset.device_batch(torch.zeros(50, 8, dtype=torch.int64, device="cuda"))
    assert devices.seen == {"cuda"}
    assert (pixels.device.type, labels.device.type) == ("cuda", "cuda")
    assert pixels.shape == (50, 3, 20, 27)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_another_function_may_make_the_batches() -> None:
    here, there = both("cutout")
    there.device_batch = recording(there)
    assert_same(here.__getitems__(range(60, 120)), there.__getitems__(range(60, 120)))


# --- hosts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_has_its_own_images_on_the_device(duplicate: Any) -> None:
    here, there = both("autoaugment", seed=5)
    there.set_epoch(2)
    here.set_epoch(2)
    expected = here.__getitems__(range(30))
    there.device_batch = lambda table: 1 / 0  # type: ignore[assignment,return-value]  # a captured one cannot be copied
    other = duplicate(there)
    assert other.device_batch is not None
    assert_same(expected, other.__getitems__(range(30)))
    assert duplicate(here).device_batch is None


def test_workers_are_refused() -> None:
    _, there = both("plain")
    loader = DataLoader(there, batch_size=4, collate_fn=collate, num_workers=1)
    with pytest.raises(RuntimeError, match=rf"the images lie on {DEVICE}, .* load with num_workers=0"):
        next(iter(loader))


def test_a_loader_that_pins_leaves_the_batch_as_it_is() -> None:
    for dataset in (both("plain")[1], MixedBatches(split_of(), CIFAR10, alpha=0.8, classes=CLASSES).to(DEVICE)):
        batch = dataset.__getitems__(range(4))
        assert pin_memory(batch) is batch


def test_what_a_device_would_round_otherwise_stays_on_the_cpu() -> None:
    resized = ImageBatches(split_of(), CIFAR10, image_size=40)
    large = ImageSplit(np.zeros((1, 257, 257, 3), np.uint8), np.zeros(1, np.int64))
    for dataset, reason in (
        (resized, "the images are resized to 40x40, which a device"),
        (ImageBatches(large, CIFAR10, "autoaugment"), "AutoAugment takes means over 257x257 pixels, which a device"),
    ):
        assert str(dataset.resident_reason).startswith(reason)
        with pytest.raises(ValueError, match=f"these batches are made on the CPU, not on a device: {reason}"):
            dataset.to(DEVICE)
        assert dataset.device_batch is None
    for dataset in (ImageBatches(large, CIFAR10, "cutout"), ImageBatches(split_of(), CIFAR10, image_size=32)):
        assert dataset.resident_reason is None
