"""`ResumingMixin`: a checkpoint that cannot be loaded ends in one line that names the file, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import CONFIG_NAME

from amp_plugin.doors.trainer_mixin import TrainerMixin
from amp_plugin.files import blamed, check_safetensors, check_types, read_json

ADVICE = "resume from an earlier checkpoint, or start anew"
_STATE = get_type_hints(TrainerState) | {
    "log_history": list[dict[str, Any]],
    "stateful_callbacks": dict[str, Any],
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps"), float
    ),  # annotated as integers, which they need not be
}
# Their state holds, for a parameter, tensors of its shape and single numbers.
_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop)
_NUMBERS = (int, float, Tensor)


class ResumingMixin(TrainerMixin):
    """Load checkpoints as any `transformers.Trainer` does, and blame the file that does not fit.

    Raises:
        FileError: From `train`: a file of the checkpoint is damaged, or belongs to another training.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / CONFIG_NAME).exists():
            read_json(folder / CONFIG_NAME, ADVICE)
        for path in folder.glob("*.safetensors"):
            check_safetensors(path, ADVICE)
        with blamed(folder, ADVICE):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        schedule, scheduler = Path(checkpoint) / SCHEDULER_NAME, self.lr_scheduler
        if schedule.is_file() and isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            with blamed(schedule, ADVICE):
                saved = torch.load(schedule, map_location="cpu", weights_only=True)
                _check_alike(saved, scheduler.state_dict(), "the schedule")
        optimizer: Any = self.optimizer
        groups = [dict(group) for group in optimizer.param_groups]
        with blamed(Path(checkpoint) / OPTIMIZER_NAME, ADVICE):
            super()._load_optimizer_and_scheduler(checkpoint)
            _check_optimizer(optimizer, groups)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        several = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        with blamed(Path(str(checkpoint)) / f"rng_state{several}.pth", ADVICE):
            super()._load_rng_state(checkpoint)


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state of the Trainer in a checkpoint as it is written there.

    Raises:
        FileError: The file is damaged.
    """
    path = checkpoint / TRAINER_STATE_NAME
    state = read_json(path, ADVICE)
    with blamed(path, ADVICE):
        TrainerState(**state)
    check_types(state, _STATE, path, ADVICE)
    callbacks = state.get("stateful_callbacks") or {}
    check_types(callbacks, dict.fromkeys(callbacks, dict[str, Any] | list[dict[str, Any]]), path, ADVICE)
    return dict(state)


def _check_alike(saved: Any, fresh: Any, name: str) -> None:
    """Raise a ValueError unless a saved state has the types of a fresh one, in the entries that they share."""
    if isinstance(fresh, Mapping) and isinstance(saved, Mapping):
        for key in saved.keys() & fresh.keys():
            _check_alike(saved[key], fresh[key], str(key))
    elif isinstance(fresh, (list, tuple)) and isinstance(saved, (list, tuple)):
        if len(saved) != len(fresh):
            raise ValueError(f"{name} has {len(saved)} entries, not {len(fresh)}")
        for i, (one, other) in enumerate(zip(saved, fresh, strict=True)):
            _check_alike(one, other, f"{name}[{i}]")
    elif isinstance(fresh, _NUMBERS) and isinstance(saved, _NUMBERS):
        if isinstance(saved, Tensor) and saved.numel() != 1:
            raise ValueError(f"{name} is not one number")
    elif isinstance(fresh, bool) and saved is None:
        pass  # the default of an option that chooses how the numbers are computed
    elif fresh is not None and type(saved) is not type(fresh):
        raise ValueError(f"{name} is a {type(saved).__name__}")


def _check_optimizer(optimizer: Any, fresh: list[dict[str, Any]]) -> None:
    """Raise a ValueError unless an optimizer has loaded a state of its parameters, and options like the fresh ones."""
    for loaded, group in zip(optimizer.param_groups, fresh, strict=True):
        if lost := group.keys() - loaded.keys():
            raise ValueError(f"it has no {min(lost)}")
        _check_alike({**loaded, "params": None}, {**group, "params": None}, "a group of parameters")
    for state in optimizer.state.values():
        if not isinstance(state, dict):
            raise ValueError(f"the state of a parameter is a {type(state).__name__}")
    rule = optimizer
    while rule is not None and not isinstance(rule, _ELEMENTWISE):
        rule = getattr(rule, "optimizer", None) or getattr(rule, "base_optimizer", None)
    for parameter, state in {} if rule is None else optimizer.state.items():
        for name, value in state.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if not (value is None or name == "step" or shape in ((), tuple(parameter.shape))):
                raise ValueError(f"{name} is {shape} where a parameter is {tuple(parameter.shape)}")
