"""Load image classification data: from the Hugging Face Hub, a local mirror of it, or the bundled sample."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from amp_plugin.data.decode import decoded_images
from amp_plugin.data.fetch import fetch
from amp_plugin.data.images import DatasetError, ImageData, ImageSplit
from amp_plugin.data.settings import SOURCES, DatasetSource, measured_settings
from amp_plugin.suggest import did_you_mean

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class _Rows:
    """One split before it is decoded, and how messages call it."""

    dataset: datasets.Dataset
    where: str


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
        label_column: column of `datasets.ClassLabel`, or of integers 0 to K - 1 that are all there in
            training.
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
    cache = _cache_folder(cache_dir)
    names = (train_split, test_split)
    loaded = fetch(name, source, names, data_root=data_root, cache=cache)
    splits = [_Rows(rows, f"data set {name!r}, split {split!r}") for rows, split in zip(loaded, names, strict=True)]
    # The cheap checks of both splits first: decoding takes its time.
    for rows in splits:
        _check_images(rows, source.image_column)
    labels = [_labels(rows, source.label_column) for rows in splits]
    class_names = _class_names(splits[0], source.label_column, labels[0])
    for rows, values in zip(splits, labels, strict=True):
        _check_range(rows, source.label_column, values, len(class_names))

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


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir)


def _feature(rows: _Rows, column: str, argument: str) -> object:
    """What the column holds, for a column that is there."""
    if column not in rows.dataset.column_names:
        raise DatasetError(
            f"{rows.where} has no column {column!r}, only {', '.join(rows.dataset.column_names)}; name the"
            f" right one with {argument}"
        )
    return rows.dataset.features[column]


def _check_images(rows: _Rows, column: str) -> None:
    import datasets

    feature = _feature(rows, column, "image_column")
    if not isinstance(feature, datasets.Image):
        raise DatasetError(
            f"{rows.where}: column {column!r} holds {feature}, not images; name a datasets.Image column with"
            " image_column, or cast it"
        )


def _labels(rows: _Rows, column: str) -> npt.NDArray[np.int64]:
    import datasets

    feature = _feature(rows, column, "label_column")
    integers = isinstance(feature, datasets.Value) and "int" in feature.dtype
    if not (integers or isinstance(feature, datasets.ClassLabel)):
        raise DatasetError(
            f"{rows.where}: column {column!r} holds {feature}, not class indices; name another with"
            f" label_column, or convert it with class_encode_column({column!r})"
        )
    values = rows.dataset.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        raise DatasetError(
            f"{rows.where}: {values.null_count} labels of column {column!r} are missing; drop those rows"
        )
    labels: npt.NDArray[np.int64] = values.to_numpy().astype(np.int64)
    return labels


def _class_names(rows: _Rows, column: str, labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """The names of the classes; their indices where the column has no names."""
    import datasets

    feature = rows.dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    classes = np.unique(labels)
    if not np.array_equal(classes, np.arange(len(classes))):
        raise DatasetError(
            f"{rows.where}: the integers of column {column!r} run from {classes[0]} to {classes[-1]},"
            f" {len(classes)} different; they must be 0 to K - 1, all of them there: renumber with"
            f" class_encode_column({column!r})"
        )
    return tuple(map(str, classes))


def _check_range(rows: _Rows, column: str, labels: npt.NDArray[np.int64], num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise DatasetError(
            f"{rows.where}, row {row}: label {labels[row]} of column {column!r} lies outside 0 to"
            f" {num_classes - 1}; drop such rows or renumber the classes"
        )
