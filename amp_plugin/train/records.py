"""Every log record of a run in a file, as it happens."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from amp_plugin.trainer.checkpoints import explained


class RecordsFile(TrainerCallback):
    """Append each record of ``trainer.state.log_history`` to a JSON Lines file when it is logged.

    A run that is killed keeps its records. One that continues from a checkpoint first drops those after the
    checkpoint, whose steps it makes again; one that starts from the beginning starts the file anew. What is not a
    finite number is null.

    Args:
        path: of the file, which the main process alone writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave in the file what the checkpoint knows, nothing without one."""
        if state.is_world_process_zero:
            new = self._path.with_name(f"_{self._path.name}")
            with explained(self._path.name, self._path.parent):
                new.write_text("".join(map(_line, state.log_history)))
                os.replace(new, self._path)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest record."""
        if state.is_world_process_zero:
            with explained(self._path.name, self._path.parent), self._path.open("a") as records:
                records.write(_line(state.log_history[-1]))


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"
