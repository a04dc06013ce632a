"""Class indices and class names from a column of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amp_plugin.data.fetch import Rows
from amp_plugin.data.layout import check_class_names
from amp_plugin.data.splits import DatasetError

Labels = npt.NDArray[np.int64]
_LARGEST = np.iinfo(np.int64).max


def class_labels(splits: Sequence[Rows], column: str) -> tuple[list[Labels], tuple[str, ...]]:
    """Return the class indices, int64 (N,), of some splits, first the one to train on, and the names of the classes.

    The column is one of `datasets.ClassLabel`, of integers 0 to K - 1 that all occur in training and are their own
    names, or of strings, whose classes are the training labels in alphabetical order.

    Raises:
        DatasetError: There are other labels or none, one class only, or a class that occurs in no training example.
    """
    import datasets

    values = [_values(rows, column) for rows in splits]
    feature = splits[0].dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        check_class_names([(rows.where, file) for rows in splits for file in rows.files], column)
    elif values[0].dtype == object:
        names = tuple(sorted(set(values[0])))
    else:
        classes = np.unique(values[0])
        if not np.array_equal(classes, np.arange(len(classes))):
            raise DatasetError(
                f"{splits[0].where}: the integers of column {column!r} run from {classes[0]} to {classes[-1]},"
                f" {len(classes)} different; they must be 0 to K - 1, all of them there: renumber with"
                f" class_encode_column({column!r})"
            )
        names = tuple(map(str, classes))
    labels = [_indices(rows, column, of_split, names) for rows, of_split in zip(splits, values, strict=True)]
    _check_occurrence(splits, column, labels, names)
    return labels, names


def _values(rows: Rows, column: str) -> npt.NDArray[Any]:
    """Read the column as int64 or, if it holds strings, as objects."""
    import datasets

    feature = rows.feature(column, "label_column")
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    if dtype.startswith("float"):
        rows.values(column, "labels")  # it may be that a label is missing
    strings = dtype in ("string", "large_string")
    if not (strings or "int" in dtype or isinstance(feature, datasets.ClassLabel)):
        raise DatasetError(
            f"{rows.where}: column {column!r} holds {feature}, not class indices or names; name another with"
            f" label_column, or convert it with class_encode_column({column!r})"
        )
    values = rows.values(column, "labels")
    if values.dtype == np.uint64 and values.max() > _LARGEST:
        raise DatasetError(
            f"{rows.where}: label {values.max()} of column {column!r} is too large for the index of a class"
        )
    return values.astype(object if strings else np.int64)


def _indices(rows: Rows, column: str, values: npt.NDArray[Any], names: tuple[str, ...]) -> Labels:
    """Turn the labels of a split into class indices."""
    if values.dtype == object:
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index.get(value, -1) for value in values], dtype=np.int64)
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    else:
        labels, known = values, f"0 to {len(names) - 1}"
    if (labels == -1).all() and values.dtype != object:
        raise DatasetError(
            f"{rows.where}: all labels of column {column!r} are -1, which stands for no label; name another split"
        )
    outside = (labels < 0) | (labels >= len(names))
    if outside.any():
        row = int(np.argmax(outside))
        raise DatasetError(
            f"{rows.where}, row {row}: label {values[row]} of column {column!r} lies outside {known}; drop such rows"
            " or renumber the classes"
        )
    return labels


def _check_occurrence(splits: Sequence[Rows], column: str, labels: Sequence[Labels], names: tuple[str, ...]) -> None:
    """Check that at least two classes occur in the training split, and all classes of the other splits."""
    trained = np.unique(labels[0])
    if len(trained) < 2:
        raise DatasetError(
            f"{splits[0].where}: column {column!r} has one class only, {names[trained[0]]}; a classifier needs two"
        )
    for rows, of_split in zip(splits[1:], labels[1:], strict=True):
        unknown = ~np.isin(of_split, trained)
        if unknown.any():
            row = int(np.argmax(unknown))
            raise DatasetError(
                f"{rows.where}, row {row}: class {names[of_split[row]]} of column {column!r} does not occur in the"
                " split to train on, so it cannot be learned; drop such rows, or name another split"
            )
