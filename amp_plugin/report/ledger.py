"""A file that remembers finished runs, one a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_to_ledger(path: Path, record: Mapping[str, Any]) -> None:
    """Append one finished run (`amp_plugin.provenance.run_record`) to a JSON Lines file, in one write.

    Args:
        path: the ledger; made if it does not exist.
        record: what `run_record` returns; what JSON cannot hold becomes text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as ledger:
        ledger.write(json.dumps(record, default=str) + "\n")
