"""A file that remembers finished runs, one a line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def append_to_ledger(path: Path, record: Mapping[str, Any]) -> None:
    """Append one finished run to a JSON Lines file that several processes may write to.

    The processes take turns by a lock, an empty file of the ledger's name and ``.lock`` beside it.

    Args:
        path: ledger, which is made if it does not exist.
        record: what `amp_plugin.provenance.run_record` returns; what JSON cannot hold becomes text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("ab+") as ledger:
        if ledger.tell():
            ledger.seek(-1, os.SEEK_END)
            begun = ledger.read(1) != b"\n"  # an editor left the last line without its end
        else:
            begun = False
        ledger.write(b"\n" * begun + json.dumps(record, default=str).encode() + b"\n")


def check_ledger(path: Path) -> None:
    """Raise a ValueError if a run could not be appended to a ledger; the ledger stays as it is, or is not made."""
    try:
        if path.is_dir():
            raise ValueError(f"ledger {str(path)!r} is a folder; give a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                path.open("a").close()
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
        FileNotFoundError: there is no such ledger.
        ValueError: a line is not a run.
    """
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a ledger: it is no text") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["settings"]["seed"], record["metrics"]["eval_error"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not a run of train.py ({error!r})") from error
        if "sync_ascent" in record["settings"]:  # the option's old name
            record["settings"]["amp_sync_ascent"] = record["settings"].pop("sync_ascent")
        records.append(record)
    return records
