"""The stock `transformers.Trainer`, given an AMP optimizer, trains with AMP: a callback attaches the model.

The callback is put among the Trainer's default callbacks when transformers.trainer is imported, by whoever imports it.
"""

from __future__ import annotations

from typing import Any

from wrapt import when_imported


def watch_trainer() -> None:
    """Let every stock Trainer whose optimizer is AMP attach it to its model when training begins."""
    when_imported("transformers.trainer")(_add_callback)


def _add_callback(trainer: Any) -> None:
    from amp_plugin.doors.attach_callback import AttachCallback

    if AttachCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(AttachCallback)
