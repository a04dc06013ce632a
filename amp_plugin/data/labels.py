"""Class indices and class names from a column of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amp_plugin.data.fetch import Rows
from amp_plugin.data.splits import DatasetError

Labels = npt.NDArray[np.int64]


def class_labels(splits: Sequence[Rows], column: str) -> tuple[list[Labels], tuple[str, ...]]:
    """Return the class indices, int64 (N,), of some splits, first the one to train on, and the names of the classes.

    The column is one of `datasets.ClassLabel`, of integers 0 to K - 1 that all occur in training and are their own
    names, or of strings, whose classes are the training labels in alphabetical order.
    """
    import datasets

    values = [_values(rows, column) for rows in splits]
    feature = splits[0].dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
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
    return [_indices(rows, column, of_split, names) for rows, of_split in zip(splits, values, strict=True)], names


def _values(rows: Rows, column: str) -> npt.NDArray[Any]:
    """Read the column as int64 or, if it holds strings, as objects."""
    import datasets

    feature = rows.feature(column, "label_column")
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    strings = dtype in ("string", "large_string")
    if not (strings or "int" in dtype or isinstance(feature, datasets.ClassLabel)):
        raise DatasetError(
            f"{rows.where}: column {column!r} holds {feature}, not class indices or names; name another with"
            f" label_column, or convert it with class_encode_column({column!r})"
        )
    return rows.values(column, "labels").astype(object if strings else np.int64)


def _indices(rows: Rows, column: str, values: npt.NDArray[Any], names: tuple[str, ...]) -> Labels:
    """Turn the labels of a split into class indices."""
    if values.dtype == object:
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index.get(value, -1) for value in values], dtype=np.int64)
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    else:
        labels, known = values, f"0 to {len(names) - 1}"
    outside = (labels < 0) | (labels >= len(names))
    if outside.any():
        row = int(np.argmax(outside))
        raise DatasetError(
            f"{rows.where}, row {row}: label {values[row]} of column {column!r} lies outside {known}; drop such rows"
            " or renumber the classes"
        )
    return labels
