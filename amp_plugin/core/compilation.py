"""Marks for `torch.compile`, which is to leave AMP's bookkeeping alone: it moves weights and counts passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(function: _F) -> _F:
    """Run a function and what it calls as they are, even where the caller is compiled."""
    uncompiled: _F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return uncompiled


def not_compiled_itself(function: _F) -> _F:
    """Run a function as it is, even where the caller is compiled; what it calls may be compiled."""
    uncompiled: _F = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return uncompiled
