"""What `torch.compile` has to be told, and what its modules take away: memory that the next pass overwrites."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


def not_compiled(function: _F) -> _F:
    """Run a function and what it calls as they are, even where the caller is compiled."""
    uncompiled: _F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return uncompiled


def not_compiled_itself(function: _F) -> _F:
    """Run a function as it is, even where the caller is compiled; what it calls may be compiled."""
    uncompiled: _F = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return uncompiled


def detached_for_good(result: _T) -> _T:
    """Return what a pass returned, detached; in memory of its own where compiled modules make CUDA graphs themselves.

    Such a module (``mode="reduce-overhead"``) overwrites in its next pass what it has returned.
    """
    copies = "torch._inductor.cudagraph_trees" in sys.modules  # which torch imports for the first such graph
    kept: _T = tree_map_only(Tensor, lambda t: t.detach().clone() if copies else t.detach(), result)
    return kept
