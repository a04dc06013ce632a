"""Check where a run would write, without writing: what `--dry_run` has in place of the checks of a run."""

from __future__ import annotations

import os
from pathlib import Path

from amp_plugin.report import read_ledger
from amp_plugin.train.folder_lock import check_free


def check_places(folder: Path, ledger: Path | None) -> None:
    """Check that a run could write to its folder and its ledger; nothing is made.

    Raises:
        ValueError: It could not.
        OSError: The ledger cannot be read.
    """
    _check_parent("output_dir", folder)
    check_free(folder)
    if ledger is not None:
        _check_parent("ledger", ledger.parent)
        if ledger.is_dir():
            raise ValueError(f"ledger {str(ledger)!r} is a folder; give a file")
        if ledger.exists():
            read_ledger(ledger)


def _check_parent(option: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to {str(folder)!r}: {there} is a file; choose another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: Permission denied; choose another {option}")
