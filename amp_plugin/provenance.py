"""Where a result comes from: the code, the versions and the settings that made it."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets", "amp_plugin")


def run_record(
    settings: Mapping[str, Any], metrics: Mapping[str, Any], execution: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describe a finished run: commit, threads, versions, settings, metrics, and what the metrics were measured on.

    `execution` tells how the run was really computed.
    """
    return {
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": dict(settings),
        "execution": dict(execution or {}),
        "evaluated_on": "validation" if settings.get("validation_images") else "test",
        "metrics": dict(metrics),
    }


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that a run's outcome depends on."""
    return {name: importlib.import_module(name).__version__ for name in _PACKAGES}


def commit() -> str | None:
    """Return the checked-out commit, marked if files differ from it; None where this package is in no repository."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # e.g. installed within another project's
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None
