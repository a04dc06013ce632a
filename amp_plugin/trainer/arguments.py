"""The arguments of `AMPTrainer`: `transformers.TrainingArguments` with AMP as the default optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from transformers import TrainingArguments

from amp_plugin.core.deprecation import warn_renamed
from amp_plugin.doors.training_args import SGD_ARGS, AMPArguments
from amp_plugin.trainer.elastic import check_process_group, rejoin


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
            check_process_group()
        rejoin(timedelta(seconds=self.ddp_timeout), self.ddp_backend)
        super().__post_init__()
