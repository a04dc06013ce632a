"""Counters and metrics that a Trainer keeps in its attributes, which the passes of a step would count several times."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# Attributes of TRL's Trainers and of those of sentence-transformers.
COUNTERS = ("_metrics", "_total_train_tokens", "_step", "_current_train_step_time", "accum_loss_components")


@contextmanager
def uncounted(trainer: Any, names: Sequence[str]) -> Iterator[None]:
    """Let the Trainer count in copies of these attributes, which are dropped at the end."""
    held = vars(trainer)
    counted = {name: held[name] for name in names if name in held}
    held.update({name: _copied(value) for name, value in counted.items()})
    try:
        yield
    finally:
        held.update(counted)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    twin = copy.copy(value)
    if isinstance(value, dict):
        twin.update({key: _copied(part) for key, part in value.items()})
    return twin
