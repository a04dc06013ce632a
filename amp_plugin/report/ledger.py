"""A file that remembers finished runs, one a line."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from amp_plugin.files import FileError, read_text
from amp_plugin.text import shortened

_LARGEST = 2**1000  # a float can be as large
_BEGINNING = b'{"commit": '  # of each line


def append_to_ledger(path: Path, record: Mapping[str, Any]) -> None:
    """Append one finished run to a JSON Lines file that several processes may write to.

    The processes take turns by a lock, an empty file of the ledger's name and ``.lock`` beside it.

    Args:
        path: ledger, which is made if it does not exist.
        record: what `amp_plugin.provenance.run_record` returns; what JSON cannot hold becomes text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, default=str).encode() + b"\n"
    with FileLock(f"{path}.lock"), path.open("ab+") as ledger:
        size = ledger.tell()
        last, kept = _last_line(ledger), size
        if last and _is_half(last):
            kept -= len(last)
            ledger.truncate(kept)
        elif last:  # an editor left the last line without its end
            line = b"\n" + line
        try:
            ledger.write(line)
            ledger.flush()
            os.fsync(ledger.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # closing tries to write again
                ledger.close()
            os.truncate(path, kept)
            raise


def _last_line(ledger: BinaryIO) -> bytes:
    """Return what follows the last line's end."""
    ledger.seek(0)
    last = b""
    while chunk := ledger.read(2**20):
        last = (last + chunk).rpartition(b"\n")[2]
    return last


def _is_half(line: bytes) -> bool:
    """Tell whether a line without an end is the beginning of a run, whose process was killed while it wrote."""
    if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return bool(line)
    return False


def check_ledger(path: Path) -> None:
    """Raise a ValueError if a run could not be appended to a ledger; the ledger stays as it is, or is not made."""
    try:
        if path.is_dir():
            raise ValueError(f"ledger {str(path)!r} is a folder; give a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                path.open("ab").close()
                read_ledger(path)
            else:
                tempfile.TemporaryFile(dir=path.parent).close()
    except FileExistsError as error:
        raise ValueError(f"ledger {str(path)!r} cannot be written: {path.parent} is no folder") from error
    except (OSError, NotImplementedError) as error:  # filelock raises the latter where locks cannot be
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"ledger {str(path)!r} cannot be written: {reason}; give another file") from error


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a ledger, the oldest first.

    Raises:
        FileError: the file cannot be read, or a line of it is not a run.
    """
    text = read_text(path, "give a ledger, with a run of train.py in each line")
    records = []
    whole, newline, last = text.rpartition("\n")
    if _is_half(last.encode()):
        text = whole + newline
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            check_record(record)
        except (ValueError, RecursionError) as error:
            raise FileError(
                f"{path}, line {number}, is not a run of train.py: {error}; delete the line, or name another ledger"
            ) from error
        if "sync_ascent" in record["settings"]:  # the option's old name
            record["settings"]["amp_sync_ascent"] = record["settings"].pop("sync_ascent")
        records.append(record)
    return records


def check_record(record: Any) -> None:
    """Raise a ValueError that tells what JSON lacks to be a finished run, of whichever version."""
    _require(record, dict, "it")
    for name in ("settings", "metrics"):
        _require(record.get(name), dict, name)
    _require(record.get("versions", {}), dict, "versions")
    settings, metrics = record["settings"], record["metrics"]
    _require(settings.get("seed"), int, "settings.seed")
    for name in ("dataset", "model", "optim", "model_kwargs"):  # a pretrained network has none of the model's
        if (value := settings.get(name, "")) is not None:
            _require(value, str, f"settings.{name}")
    try:
        _require(json.loads(settings.get("model_kwargs") or "{}"), dict, "it")
    except ValueError as error:
        raise ValueError(f"settings.model_kwargs: {error}") from None
    for name, value in {"eval_error": None, **metrics}.items():
        _require(value, (int, float), f"metrics.{name}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"metrics.{name} has {len(str(value))} digits")


def _require(value: Any, kind: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        words: dict[Any, str] = {dict: "a mapping", str: "a text", int: "an integer"}
        raise ValueError(f"{name} is {shortened(json.dumps(value), 40)}, not {words.get(kind, 'a number')}")
