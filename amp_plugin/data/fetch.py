"""Find a data set: on the Hugging Face Hub, in a local mirror of it, or beside this file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amp_plugin.data.settings import BUNDLED
from amp_plugin.data.splits import DatasetError

if TYPE_CHECKING:
    import datasets

_HUB_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Rows:
    """One split before it is decoded, and how messages call it."""

    dataset: datasets.Dataset
    where: str

    def feature(self, column: str, argument: str) -> object:
        """What a column holds.

        Raises:
            DatasetError: there is no such column.
        """
        if column not in self.dataset.column_names:
            raise DatasetError(
                f"{self.where} has no column {column!r}, only {', '.join(self.dataset.column_names)}; name the"
                f" right one with {argument}"
            )
        return self.dataset.features[column]


def fetch(
    name: str,
    path: str,
    config: str | None,
    splits: Sequence[str],
    *,
    data_root: str | os.PathLike[str] | None,
    cache: Path,
) -> list[Rows]:
    """Load some splits of a data set, with one message for whatever goes wrong.

    Args:
        name: how messages call the data set.
        path: where it lives on the Hub, or a folder.
        config: its configuration, where it has several.
        splits: their names.
        data_root: local mirror of the Hub to take it from; ignored by an absolute path, as the sample's is.
        cache: folder for the Arrow files.

    Returns:
        The splits, none of them empty.

    Raises:
        DatasetError: the folder is missing, the Hub out of reach, its files cannot be loaded, or a split is
            missing or empty.
    """
    import datasets

    if os.path.isfile(path):
        raise DatasetError(
            f"data set {name!r} is a file; give the folder it is in, with one file for each split, e.g."
            " train.csv and test.csv"
        )
    if data_root is not None:
        folder = Path(data_root) / path  # which stays as it is if absolute, as the bundled sample's
        if not folder.is_dir():
            raise DatasetError(
                f"data set {name!r}: there is no folder {folder}; give a --data_root DIR that holds {path},"
                f" laid out like the Hub, or use --dataset {BUNDLED}"
            )
        path = str(folder)
        # A mirror need not have the card that names the configurations; it has their folders.
        if config is not None and (folder / config).is_dir():
            path, config = str(folder / config), None
    unreachable = None if os.path.isdir(path) else _hub_error(path)
    try:
        with _offline(unreachable is not None):
            # What load_dataset does, but for the splits that are asked for: it fails if any other is empty.
            builder = datasets.load_dataset_builder(path, config, cache_dir=str(cache))
            builder.download_and_prepare()
    except Exception as error:  # builders raise what they like, and so does the HTTP client
        if unreachable is not None or isinstance(error, ConnectionError):
            reason = _first_line(unreachable or error)
            raise DatasetError(
                f"data set {name!r}: the Hugging Face Hub cannot be reached ({reason}) and the cache {cache} does"
                f" not have {path}; use --data_root DIR, a copy laid out like the Hub, or --dataset {BUNDLED}"
            ) from None
        raise DatasetError(
            f"data set {name!r}: datasets.load_dataset({path!r}, {config!r}) fails, {_first_line(error)};"
            " check the name, config_name and the files, use --data_root DIR, a copy laid out like the Hub,"
            f" or --dataset {BUNDLED}"
        ) from error
    rows = {split: info.num_examples for split, info in builder.info.splits.items()}
    for split in splits:
        if not rows.get(split):
            fault = "is empty" if split in rows else "is missing"
            raise DatasetError(
                f"data set {name!r}: split {split!r} {fault}, there are {', '.join(rows)}; name the one to use"
                " with train_split or test_split"
            )
    return [Rows(builder.as_dataset(split=split), f"data set {name!r}, split {split!r}") for split in splits]


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where a cache is kept: as told, or where Hugging Face Datasets has its own."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir)


def _hub_error(path: str) -> Exception | None:
    """Ask the Hub once whether it is there; None if it answers, whatever the answer.

    Left to itself, its client retries for half a minute or more, one warning each, before it looks in its
    cache.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(path, timeout=_HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return None  # load_dataset will word it better
    except Exception as error:  # of the HTTP library, which depends on the client's version
        return error
    return None


@contextmanager
def _offline(active: bool) -> Iterator[None]:
    """Have `datasets` look in its cache only."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
