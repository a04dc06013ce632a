"""timm's training tasks, which find their AMP optimizer, so that the stock train.py trains with AMP unedited.

The stock script makes the optimizer and the task apart from each other (``--opt amp --device-modules amp_plugin``), so
a task looks for the AMP optimizer of its parameters at its first training pass.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.task import TrainingTask
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from amp_plugin.core.compilation import not_compiled, not_compiled_itself
from amp_plugin.core.optimizer import AMP, _instances
from amp_plugin.doors.attach import attach
from amp_plugin.doors.attachment import Attachment

_logger = logging.getLogger(__name__)


def watch_tasks() -> None:
    """Attach every `timm.task.TrainingTask` made from now on, when it first trains an AMP optimizer's parameters."""
    register_module_module_registration_hook(_on_registration)


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # The hook goes on the task and not on its model, which timm copies for its moving average.
    if isinstance(module, TrainingTask) and _attach_when_training not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_attach_when_training, with_kwargs=True, prepend=True)


@not_compiled_itself
def _attach_when_training(task: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (attachment := _attachment_of(task)) is not None:
        attachment.before(task, args, kwargs)  # torch will call the new hook only from the next pass on


@not_compiled
def _attachment_of(task: nn.Module) -> Attachment | None:
    amp = _optimizer_of(task) if task.training and torch.is_grad_enabled() else None
    if amp is None:
        return None
    attachment = attach(amp, task)
    for handle, hook in list(task._forward_pre_hooks.items()):
        if hook is _attach_when_training:
            del task._forward_pre_hooks[handle], task._forward_pre_hooks_with_kwargs[handle]
    # This is a warning, because the loop may train with another optimizer by now and not know that AMP is still there.
    described, _, _groups = repr(amp).partition(" (\n")  # with layer-wise decay there are dozens of groups
    _logger.warning("Adversarial Model Perturbation is attached to %s: %s", type(task).__name__, described)
    return attachment


def _optimizer_of(task: nn.Module) -> AMP | None:
    free = [amp for amp in _instances if not (amp.attached or amp.progress.in_closure)]
    held = set(task.parameters()) if free else set()
    found = [amp for amp in free if all(p in held for group in amp.param_groups for p in group["params"])]
    if len(found) > 1:
        raise RuntimeError(
            f"{len(found)} AMP optimizers hold parameters of this {type(task).__name__}; call attach(optimizer, task)"
            " with the one that trains it"
        )
    return found[0] if found else None
