"""Find a data set on the Hugging Face Hub, in a local mirror of it, or beside this file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from amp_plugin.data.layout import check_layout
from amp_plugin.data.settings import BUNDLED
from amp_plugin.data.splits import DatasetError

if TYPE_CHECKING:
    import datasets

_HUB_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Rows:
    """One split before it is decoded, its name in messages, and the files it comes from, as far as they are known."""

    dataset: datasets.Dataset
    where: str
    files: list[str] = field(default_factory=list)

    def feature(self, column: str, argument: str) -> Any:
        """Return the type of a column; where there is none, the message says which argument names it."""
        if column not in self.dataset.column_names:
            raise DatasetError(
                f"{self.where} has no column {column!r}, only {', '.join(self.dataset.column_names)}; name the"
                f" right one with {argument}"
            )
        return self.dataset.features[column]

    def values(self, column: str, kind: str) -> npt.NDArray[Any]:
        """Return the values of a column; where one is missing, the message calls them ``kind``."""
        values = self.dataset.select_columns([column]).with_format("arrow")[:].column(column)
        if values.null_count == len(values):
            raise DatasetError(
                f"{self.where}: all {kind} of column {column!r} are missing; name another split or column"
            )
        if values.null_count:
            raise DatasetError(
                f"{self.where}: {values.null_count} {kind} of column {column!r} are missing; drop those rows"
            )
        array: npt.NDArray[Any] = values.to_numpy()
        return array


def fetch(
    name: str,
    path: str,
    config: str | None,
    splits: Sequence[str],
    *,
    data_root: str | os.PathLike[str] | None,
    cache: Path,
) -> list[Rows]:
    """Load some splits of a data set, none of them empty; a `DatasetError` says whatever goes wrong.

    The path is an id on the Hub, of which ``data_root`` may be a local mirror, or a folder. The Arrow files go to the
    folder ``cache``.
    """
    import datasets

    if os.path.isfile(path):
        raise DatasetError(
            f"data set {name!r} is a file; give the folder it is in, with one file for each split, e.g."
            " train.csv and test.csv"
        )
    if data_root is not None:
        folder = Path(data_root) / path  # an absolute path, as the bundled sample's, stays as it is
        if not folder.is_dir():
            raise DatasetError(
                f"data set {name!r}: there is no folder {folder}; give a --data_root DIR that holds {path},"
                f" laid out like the Hub, or use --dataset {BUNDLED}"
            )
        path = str(folder)
        # A mirror need not have the card that names the configurations; it has their folders.
        if config is not None and (folder / config).is_dir():
            path, config = str(folder / config), None
    elif (path.startswith((".", "/", "~")) or path.count("/") > 1) and not os.path.isdir(path):  # no id on the Hub
        raise DatasetError(f"data set {name!r}: there is no folder {os.path.abspath(path)}")
    unreachable = None if os.path.isdir(path) else _hub_error(path)
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or unreachable is not None  # so it looks in its cache at once
        # load_dataset would fail if a split that nobody asked for is empty.
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
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    rows = {split: info.num_examples for split, info in builder.info.splits.items()}
    for split in splits:
        if not rows.get(split):
            fault = "is empty" if split in rows else "is missing"
            raise DatasetError(
                f"data set {name!r}: split {split!r} {fault}, there are {', '.join(rows)}; name the one to use"
                " with train_split or test_split"
            )
    check_layout(name, builder, splits)
    files = {split: [str(file) for file in (builder.config.data_files or {}).get(split, [])] for split in splits}
    where = f"data set {name!r}, split"
    return [Rows(builder.as_dataset(split=split), f"{where} {split!r}", files[split]) for split in splits]


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the cache, by default that of Hugging Face Datasets."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir)


def _hub_error(path: str) -> Exception | None:
    """Ask the Hub once whether it is there; return None if it answers, whatever the answer.

    Without this question, the Hub's client retries for half a minute or more, with one warning each time, before it
    looks in its cache.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(path, timeout=_HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return None  # load_dataset will word it better
    except Exception as error:  # the HTTP library, and so the class, depends on the client's version
        return error
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
