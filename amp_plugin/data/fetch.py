"""Find a data set on the Hugging Face Hub, in a local mirror of it, or beside this file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from amp_plugin.data.failures import logged_errors, reason
from amp_plugin.data.layout import check_layout
from amp_plugin.data.settings import BUNDLED
from amp_plugin.data.splits import DatasetError
from amp_plugin.files import in_one_line

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
                f"{self.where}: {values.null_count} {kind} of column {column!r} are missing, the first in row"
                f" {values.is_null().index(True)}; drop those rows"
            )
        try:
            array: npt.NDArray[Any] = values.to_numpy()
        except Exception:
            raise DatasetError(
                f"{self.where}, row {_not_utf8(values)}: column {column!r} holds no text in UTF-8; save the file as"
                " UTF-8"
            ) from None
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
    offline, logged = datasets.config.HF_HUB_OFFLINE, []  # type: tuple[bool, list[str]]
    try:
        datasets.config.HF_HUB_OFFLINE = offline or unreachable is not None  # so it looks in its cache at once
        # load_dataset would fail if a split that nobody asked for is empty.
        with logged_errors() as logged:
            builder = datasets.load_dataset_builder(path, config, cache_dir=str(cache))
            builder.download_and_prepare()
    except Exception as error:  # builders raise what they like, and so does the HTTP client
        if unreachable is not None or isinstance(error, ConnectionError):
            why = _first_line(unreachable or error)
            raise DatasetError(
                f"data set {name!r}: the Hugging Face Hub cannot be reached ({why}) and the cache {cache} does"
                f" not have {path}; use --data_root DIR, a copy laid out like the Hub, or --dataset {BUNDLED}"
            ) from None
        if isinstance(error, OSError) and (problem := _problem_of(cache)):
            raise DatasetError(
                f"data set {name!r}: the cache {cache} cannot be written to ({problem}); set HF_HOME to a folder that"
                " can be"
            ) from None
        raise DatasetError(
            f"data set {name!r}: datasets.load_dataset({path!r}, {config!r}) fails, {reason(error, logged, path)};"
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
    try:
        return [Rows(builder.as_dataset(split=split), f"{where} {split!r}", files[split]) for split in splits]
    except Exception as error:  # the cache was cut short, e.g. by a disk that was full
        raise DatasetError(
            f"data set {name!r}: the cache {builder.cache_dir} is damaged ({in_one_line(error)}); delete it, and it is"
            " made anew"
        ) from error


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


def _not_utf8(values: Any) -> int:
    """Return the first row whose text cannot be decoded."""
    for row, value in enumerate(values):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return row
    return len(values)


def _problem_of(cache: Path) -> str | None:
    """Return why no file can be written in a folder, which is made if need be; None if one can."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
