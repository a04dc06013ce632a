"""A file that remembers finished runs, one a line."""

from __future__ import annotations

import json
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
    with FileLock(f"{path}.lock"), path.open("a") as ledger:
        ledger.write(json.dumps(record, default=str) + "\n")


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a ledger, the oldest first.

    Raises:
        FileNotFoundError: there is no such ledger.
        ValueError: a line is not a run.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            record["settings"]["seed"], record["metrics"]["eval_error"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not a run of train.py ({error!r})") from error
        if "sync_ascent" in record["settings"]:  # the option's old name
            record["settings"]["amp_sync_ascent"] = record["settings"].pop("sync_ascent")
        records.append(record)
    return records
