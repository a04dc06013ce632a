"""Warnings that name the line of the user's program, whatever is between it and this package."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

# "<" begins the name of no file.
_OTHERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__, "<")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest line outside torch and this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OTHERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, level)
