"""What `torch.compile` shall leave alone: AMP's own bookkeeping, which moves weights and counts passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(function: _F) -> _F:
    """Run a function, and what it calls, as it is, even where the caller is compiled."""
    uncompiled: _F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return uncompiled


def not_compiled_itself(function: _F) -> _F:
    """The same for the function alone: what it calls may be compiled."""
    uncompiled: _F = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return uncompiled
