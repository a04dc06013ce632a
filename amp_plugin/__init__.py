"""Adversarial Model Perturbation for timm, transformers.Trainer and accelerate.

Importing the package registers the optimizers (``amp``, ``ampadamw``, ``amplamb``) and the paper's architectures
with timm. What needs transformers, datasets or evaluate is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amp_plugin.interrupts import leave_while_importing

leave_while_importing()  # before what takes seconds
# ruff: noqa: E402
from amp_plugin import models as models
from amp_plugin._moved import find_moved_modules
from amp_plugin.core.capture import CapturedStep
from amp_plugin.core.loss import LossModule
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.perturbation import Perturbation
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.doors.accelerate import amp_backward, watch_accelerate
from amp_plugin.doors.attach import attach, detach
from amp_plugin.doors.attachment import Attachment
from amp_plugin.doors.lightning import watch_lightning
from amp_plugin.doors.stock_trainer import watch_trainer
from amp_plugin.doors.timm import register_optimizers
from amp_plugin.doors.timm_tasks import watch_tasks

if TYPE_CHECKING:
    from amp_plugin.doors.trainer import AMPMixin
    from amp_plugin.doors.training_args import AMPArguments
    from amp_plugin.metrics import ImageClassificationMetric
    from amp_plugin.trainer.arguments import AMPTrainingArguments
    from amp_plugin.trainer.trainer import AMPTrainer

__all__ = [
    "AMP",
    "AMPArguments",
    "AMPMixin",
    "AMPTrainer",
    "AMPTrainingArguments",
    "Attachment",
    "CapturedStep",
    "ExtraPasses",
    "ImageClassificationMetric",
    "LossModule",
    "Perturbation",
    "amp_backward",
    "attach",
    "detach",
]
__version__ = "0.2.0"

_LAZY = {
    "AMPArguments": "amp_plugin.doors.training_args",
    "AMPMixin": "amp_plugin.doors.trainer",
    "AMPTrainer": "amp_plugin.trainer.trainer",
    "AMPTrainingArguments": "amp_plugin.trainer.arguments",
    "ImageClassificationMetric": "amp_plugin.metrics",
}

find_moved_modules()
register_optimizers()
watch_accelerate()
watch_lightning()
watch_tasks()
watch_trainer()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
