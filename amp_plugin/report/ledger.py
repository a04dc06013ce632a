"""A file that remembers finished runs, one a line."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_to_ledger(path: Path, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Append one finished run to a JSON Lines file, in one write: settings, versions, commit and metrics.

    Args:
        path: the ledger; made if it does not exist.
        settings: of the run; only what JSON can hold is kept.
        metrics: of the run.
    """
    record = {
        "commit": _commit(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(),
        "settings": dict(settings),
        "metrics": dict(metrics),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as ledger:
        ledger.write(json.dumps(record, default=str) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages that a run's figures may depend on."""
    names = ("torch", "timm", "transformers", "accelerate", "datasets", "amp_plugin")
    return {name: importlib.import_module(name).__version__ for name in names}


def _commit() -> str | None:
    """The checked-out commit, marked if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
