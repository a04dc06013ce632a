"""The arguments of `AMPTrainer`: `transformers.TrainingArguments` with AMP as the default optimizer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from transformers import TrainingArguments

from amp_plugin.core.deprecation import warn_renamed
from amp_plugin.doors.training_args import SGD_ARGS, AMPArguments


@dataclass
class AMPTrainingArguments(AMPArguments):
    """Arguments of :class:`amp_plugin.AMPTrainer`. AMP here is Adversarial Model Perturbation, not mixed precision.

    Raises:
        ValueError: The base optimizer or a policy is unknown, or several processes would each train alone. The
            optimizer itself checks its hyper-parameters.
    """

    optim: str = field(
        default="amp",
        metadata={
            "help": "Optimizer. 'amp': Adversarial Model Perturbation around SGD; 'amp_NAME': around any optimizer"
            " that the stock Trainer knows, e.g. amp_adamw_torch; or a stock name alone, to train without it. SGD gets"
            f" {SGD_ARGS} unless --optim_args says otherwise."
        },
    )
    sync_ascent: bool | None = field(default=None, metadata={"help": "Deprecated: the old name of --amp_sync_ascent."})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse to share a class with other arguments: one of the two would lose its defaults to the other."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[1:]:
            ours = issubclass(base, AMPTrainingArguments) or base in AMPTrainingArguments.__mro__
            if not ours and issubclass(base, TrainingArguments):
                raise TypeError(
                    f"{cls.__name__} cannot have the defaults of both AMPTrainingArguments and {base.__name__}; combine"
                    f" {base.__name__} with amp_plugin.AMPArguments, which has only AMP's own, and say optim='amp'"
                )

    def __post_init__(self) -> None:
        """Join the processes, and check the arguments."""
        if self.sync_ascent is not None:
            warn_renamed("sync_ascent", "amp_sync_ascent", stacklevel=3)
            self.amp_sync_ascent, self.sync_ascent = self.sync_ascent, None
        if self.base_optim == "sgd" and self.optim_args is None:
            self.optim_args = SGD_ARGS  # without AMP, too: the two are to be compared
        if not self.use_cpu:
            _check_process_group()
        _rejoin(timedelta(seconds=self.ddp_timeout), self.ddp_backend)
        super().__post_init__()


def _rejoin(timeout: timedelta, backend: str | None) -> None:
    """Make the process group, if torchrun has restarted this process after a failure; else do nothing.

    torchrun keeps the store in which the processes find one another, with the addresses of the processes that died: the
    new processes then wait for them (https://github.com/pytorch/pytorch/issues/135712). The new group therefore goes
    by names of its own in the store. Several nodes count their restarts apart, so they need torchrun's own way out:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.
    """
    env = os.environ
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1"
    if restarts == "0" or not shared or distributed.is_initialized():
        return
    store = distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout)  # type: ignore[attr-defined]
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore(f"restart {restarts}", store),  # type: ignore[attr-defined]
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        timeout=timeout,
    )


def _check_process_group() -> None:
    """Refuse processes that were launched together but would each train alone, and save over one another.

    Where there is no accelerator, transformers joins the processes only if it is told ``use_cpu``; else it just warns.
    """
    env = os.environ
    launched = int(env.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in env else 1
    device = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = env.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")  # set by accelerate launch --cpu
    if launched > 1 and not on_cpu and (device is None or device.type == "mps"):
        raise ValueError(
            f"{launched} processes were launched on a machine without accelerators, and each would train alone; to"
            " train together on CPUs, add --use_cpu true (use_cpu=True)"
        )
