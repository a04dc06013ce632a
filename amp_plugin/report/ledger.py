"""A file that remembers finished runs, one a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def append_to_ledger(path: Path, record: Mapping[str, Any]) -> None:
    """Append one finished run (`amp_plugin.provenance.run_record`) to a JSON Lines file that several may write to.

    They take turns by a lock, an empty file of the ledger's name and ``.lock`` beside it.

    Args:
        path: the ledger; made if it does not exist.
        record: what `run_record` returns; what JSON cannot hold becomes text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("a") as ledger:
        ledger.write(json.dumps(record, default=str) + "\n")
