"""Text classification data, and batches of tokens for a `DataLoader` or a Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amp_plugin.data.fetch import Rows, cache_folder, fetch
from amp_plugin.data.labels import class_labels
from amp_plugin.data.splits import DatasetError, LabelledSplit


@dataclass(frozen=True, eq=False)
class TextSplit(LabelledSplit):
    """Texts and labels of one split.

    Attributes:
        texts: str (N, 1), or (N, 2) where an example is a pair of texts.
        labels: int64 (N,).
    """

    kind: ClassVar[str] = "texts"
    texts: npt.NDArray[np.object_]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TextData:
    """A data set as `load_texts` returns it."""

    name: str
    train: TextSplit
    test: TextSplit
    class_names: tuple[str, ...]


class TextBatches(Dataset[dict[str, Tensor]]):
    """Batches of one split, padded to their longest example, for a `DataLoader` with `collate`.

    Args:
        split: texts and labels.
        tokenizer: tokenizer of `transformers`, with a token to pad with.
        max_length: largest number of tokens of an example; the rest is cut off.
    """

    def __init__(self, split: TextSplit, tokenizer: Any, max_length: int) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one example: input_ids int64 (L,), the tokenizer's other tensors, and labels, an int64 scalar."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch, as a `DataLoader` asks for it: input_ids int64 (B, L), labels int64 (B,), and so on."""
        columns = [list(column) for column in self.split.texts[np.asarray(indices)].T]
        tokens = self.tokenizer(
            *columns, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**tokens, "labels": torch.from_numpy(self.split.labels[np.asarray(indices)])}


def load_texts(
    name: str,
    *,
    text_column: str,
    text_pair_column: str | None = None,
    label_column: str = "label",
    data_root: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
) -> TextData:
    """Load the training and test texts of a data set.

    Args:
        name: id on the Hub, or a folder of CSV, JSON Lines or Parquet files, one for each split.
        text_column: column of the texts.
        text_pair_column: column of the second texts, for pairs.
        label_column: column of the labels, see `class_labels`.
        data_root: folder laid out like the Hub to load from instead of the Hub.
        cache_dir: folder for the Arrow files; by default the cache of Hugging Face Datasets.
        config_name: configuration of the data set, where it has several.
        train_split: split to train on.
        test_split: split to test on.

    Raises:
        DatasetError: the data set is out of reach, or the arguments do not fit it.
    """
    names = (train_split, test_split)
    splits = fetch(name, name, config_name, names, data_root=data_root, cache=cache_folder(cache_dir))
    columns = {"text_column": text_column}
    if text_pair_column is not None:
        columns["text_pair_column"] = text_pair_column
    texts = [_texts(rows, columns) for rows in splits]
    labels, class_names = class_labels(splits, label_column)
    train, test = (TextSplit(*split) for split in zip(texts, labels, strict=True))
    return TextData(name, train, test, class_names)


def _texts(rows: Rows, columns: dict[str, str]) -> npt.NDArray[np.object_]:
    """Read the columns side by side; the keys are the arguments that name them."""
    import datasets

    for argument, column in columns.items():
        feature = rows.feature(column, argument)
        if not (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")):
            raise DatasetError(
                f"{rows.where}: column {column!r} holds {feature}, not texts; name another with {argument}"
            )
    return np.stack([rows.values(column, "texts").astype(object) for column in columns.values()], axis=1)
