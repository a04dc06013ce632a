"""Load image classification data: from the Hugging Face Hub, a local mirror of it, or the bundled sample."""

from __future__ import annotations

import os
from dataclasses import replace

from amp_plugin.data.decode import decoded_images
from amp_plugin.data.fetch import Rows, cache_folder, fetch
from amp_plugin.data.images import ImageData, ImageSplit
from amp_plugin.data.labels import class_labels
from amp_plugin.data.settings import SOURCES, DatasetSource, measured_settings
from amp_plugin.data.splits import DatasetError
from amp_plugin.suggest import did_you_mean


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
    """Load the training and test images of a data set, decoded.

    Args:
        name: cifar10, cifar100, svhn, cifar10_sample (2,000 + 500 images of CIFAR-10 that come with the
            package), or anything that `datasets.load_dataset` loads, with its two columns.
        data_root: folder laid out like the Hub (``DATA_ROOT/uoft-cs/cifar10/...``) to load from instead of
            the Hub.
        cache_dir: folder for what is made from the downloads: Arrow files, and decoded images under
            ``amp_plugin``; by default that of Hugging Face Datasets.
        image_column: column of `datasets.Image`; grayscale and palette images become RGB.
        label_column: as `class_labels` takes it.
        config_name: the data set's configuration, where it has several.
        train_split: the split to train on.
        test_split: the split to test on.
        image_size: resize every image to this height and width (bicubic, ignoring the aspect ratio).

    Raises:
        DatasetError: the data set is unknown or out of reach, or is not what the arguments say.
    """
    if image_size is not None and image_size < 1:
        raise DatasetError(f"data set {name!r}: image_size must be positive, got {image_size}")
    source = _source(name, image_column, label_column, config_name)
    cache = cache_folder(cache_dir)
    names = (train_split, test_split)
    splits = fetch(name, source.path, source.config_name, names, data_root=data_root, cache=cache)
    # The cheap checks of both splits first: decoding takes its time.
    for rows in splits:
        _check_images(rows, source.image_column)
    labels, class_names = class_labels(splits, source.label_column)

    train, test = (
        decoded_images(
            rows.dataset,
            source.image_column,
            where=rows.where,
            image_size=image_size,
            cache_dir=cache / "amp_plugin",
        )
        for rows in splits
    )
    if train.shape[1:] != test.shape[1:]:
        raise DatasetError(
            f"data set {name!r}: images are {train.shape[1:3]} in split {train_split!r} and"
            f" {test.shape[1:3]} in split {test_split!r} (height, width); pass image_size to resize them all"
        )
    settings = source.settings or measured_settings(train)
    return ImageData(name, ImageSplit(train, labels[0]), ImageSplit(test, labels[1]), class_names, settings)


def _source(name: str, image: str | None, label: str | None, config: str | None) -> DatasetSource:
    """Look the data set up, the caller's columns and configuration overruling the table's."""
    if name in SOURCES:
        known = SOURCES[name]
        return replace(
            known,
            config_name=config or known.config_name,
            image_column=image or known.image_column,
            label_column=label or known.label_column,
        )
    if image is None or label is None:
        raise DatasetError(
            f"data set {name!r} is unknown{did_you_mean(name, SOURCES)}; known are {', '.join(SOURCES)}; for any other"
            " that datasets.load_dataset can load, give image_column and label_column"
        )
    return DatasetSource(name, config, image, label)


def _check_images(rows: Rows, column: str) -> None:
    import datasets

    feature = rows.feature(column, "image_column")
    if not isinstance(feature, datasets.Image):
        raise DatasetError(
            f"{rows.where}: column {column!r} holds {feature}, not images; name a datasets.Image column with"
            " image_column, or cast it"
        )
