"""Image classification data: from the Hugging Face Hub, a local mirror of it, or the bundled sample."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from amp_plugin.data.decode import decoded_images
from amp_plugin.data.fetch import cache_folder, fetch
from amp_plugin.data.labels import class_labels
from amp_plugin.data.settings import SOURCES, DatasetSettings, DatasetSource, measured_settings
from amp_plugin.data.splits import DatasetError, LabelledSplit
from amp_plugin.suggest import did_you_mean


@dataclass(frozen=True, eq=False)
class ImageSplit(LabelledSplit):
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, H, W, 3), RGB; a read-only memory map where `load_images` made it.
        labels: int64 (N,).

    Raises:
        ValueError: an array has another shape or type.
    """

    kind: ClassVar[str] = "images"
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {self.images.dtype} {self.images.shape}")
        if self.labels.dtype != np.int64 or self.labels.shape != self.images.shape[:1]:
            got = f"{self.labels.dtype} {self.labels.shape}"
            raise ValueError(f"labels must be int64 ({len(self.images)},), one an image, got {got}")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set as `load_images` returns it."""

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    settings: DatasetSettings

    @property
    def num_classes(self) -> int:
        """Number of classes; labels lie in [0, num_classes)."""
        return len(self.class_names)


def load_images(
    name: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_size: int | None = None,
) -> ImageData:
    """Load and decode the training and test images of a data set.

    Args:
        name: cifar10, cifar100, svhn, cifar10_sample (2,000 + 500 images of CIFAR-10 that come with the
            package), or anything that `datasets.load_dataset` loads, with its two columns.
        data_root: folder laid out like the Hub (``DATA_ROOT/uoft-cs/cifar10/...``) to load from instead of
            the Hub.
        cache_dir: folder for the Arrow files and, under ``amp_plugin``, the decoded images; by default the cache of
            Hugging Face Datasets.
        image_column: column of `datasets.Image`, or of the bytes of image files; grayscale and palette images become
            RGB.
        label_column: column of the labels, see `class_labels`.
        config_name: configuration of the data set, where it has several.
        train_split: split to train on.
        test_split: split to test on.
        image_size: height and width to which every image is resized (bicubic, ignoring the aspect ratio); by default
            images keep their size.

    Raises:
        DatasetError: the data set is unknown or out of reach, or the arguments do not fit it.
    """
    if image_size is not None and image_size < 1:
        raise DatasetError(f"data set {name!r}: image_size must be positive, got {image_size}")
    source = _source(name, image_column, label_column, config_name)
    cache = cache_folder(cache_dir)
    names = (train_split, test_split)
    splits = fetch(name, source.path, source.config_name, names, data_root=data_root, cache=cache)
    import datasets

    # All cheap checks of both splits come first, because decoding takes its time.
    for rows in splits:
        feature = rows.feature(source.image_column, "image_column")
        if not _holds_images(feature):
            paths = isinstance(feature, datasets.Value) and "string" in feature.dtype
            hint = "; where these are paths, call the file metadata.csv and the column file_name" if paths else ""
            raise DatasetError(
                f"{rows.where}: column {source.image_column!r} holds {feature}, not images; name a datasets.Image"
                f" column with image_column, or cast it{hint}"
            )
    labels, class_names = class_labels(splits, source.label_column)
    train, test = (
        decoded_images(
            rows.dataset, source.image_column, where=rows.where, image_size=image_size, cache_dir=cache / "amp_plugin"
        )
        for rows in splits
    )
    if train.shape[1:] != test.shape[1:]:
        raise DatasetError(
            f"data set {name!r}: images are {train.shape[1:3]} in split {train_split!r} and"
            f" {test.shape[1:3]} in split {test_split!r} (height, width); pass image_size to resize them all"
        )
    try:
        settings = source.settings or measured_settings(train)
    except ValueError as error:
        raise DatasetError(f"{splits[0].where}: {error}; look at column {source.image_column!r}") from None
    return ImageData(name, ImageSplit(train, labels[0]), ImageSplit(test, labels[1]), class_names, settings)


def _holds_images(feature: Any) -> bool:
    """Tell whether a column holds images: as such, or as the bytes of their files, which `datasets.Image` stores."""
    import datasets

    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"} and _holds_images(feature["bytes"])
    return isinstance(feature, datasets.Image) or feature in (datasets.Value("binary"), datasets.Value("large_binary"))


def _source(name: str, image: str | None, label: str | None, config: str | None) -> DatasetSource:
    """Look the data set up; the caller's columns and configuration overrule those of the table."""
    if name in SOURCES:
        given: dict[str, Any] = {"config_name": config, "image_column": image, "label_column": label}
        return replace(SOURCES[name], **{argument: value for argument, value in given.items() if value})
    if image is None or label is None:
        raise DatasetError(
            f"data set {name!r} is unknown{did_you_mean(name, SOURCES)}; known are {', '.join(SOURCES)}; for any other"
            " that datasets.load_dataset can load, give image_column and label_column"
        )
    return DatasetSource(name, config, image, label)
