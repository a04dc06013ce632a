"""`transformers.TrainingArguments` with AMP: ``--optim amp``, ``--optim amp_adamw_torch``, ``--amp_epsilon 0.5``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from amp_plugin.core.policies import make_policy
from amp_plugin.core.replay import check_policies
from amp_plugin.suggest import did_you_mean
from amp_plugin.trainer.elastic import refuse_processes_without_group, rejoin

_PREFIX = "amp_"
# The paper's base optimizer, and so the default of "amp" and, to be comparable, of "sgd".
_SGD_ARGS = "momentum=0.9,nesterov=True"


@dataclass
class AMPTrainingArguments(TrainingArguments):
    """Arguments of :class:`amp_plugin.AMPTrainer`. AMP here is Adversarial Model Perturbation, not mixed precision.

    Raises:
        ValueError: unknown base optimizer or policy, or several processes that would each train alone; the optimizer
            itself checks its hyper-parameters.
    """

    _further_optims: ClassVar[tuple[str, ...]] = ()  # that a subclass knows

    optim: str = field(
        default="amp",
        metadata={
            "help": "Optimizer. 'amp': Adversarial Model Perturbation around SGD; 'amp_NAME': around any optimizer"
            " that the stock Trainer knows, e.g. amp_adamw_torch; or a stock name alone, to train without it. SGD gets"
            f" {_SGD_ARGS} unless --optim_args says otherwise."
        },
    )
    amp_epsilon: float = field(default=0.5, metadata={"help": "Radius of the ball around the weights."})
    amp_inner_lr: float = field(default=1.0, metadata={"help": "Step length of the ascent (zeta in the paper)."})
    amp_inner_iter: int = field(
        default=1, metadata={"help": "Ascent steps per update; a training step costs this many passes more."}
    )
    amp_norm: str = field(
        default="tensor",
        metadata={"help": "'tensor': one ball per parameter tensor (the published numbers); 'global': one for all."},
    )
    amp_ascent: str = field(
        default="full",
        metadata={
            "help": "Which steps ascend and along what, for fewer passes: 'full' (the paper), 'subset(0.5)',"
            " 'every(2)', 'window(0.5, 1.0)', 'stale', 'momentum', 'adaptive(0.0)', or several, separated by commas."
        },
    )
    amp_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Parameters to perturb: 'norm', those of normalisation layers, or a regular expression to be found"
            " in their names. Default: all."
        },
    )
    amp_batch_norm: str = field(
        default="clean",
        metadata={"help": "BatchNorm running statistics: from the 'clean' pass only, or from 'all' passes."},
    )
    amp_rng: str = field(
        default="same",
        metadata={"help": "Dropout masks in the passes of one step: the 'same', or 'fresh' ones."},
    )
    sync_ascent: bool = field(
        default=True,
        metadata={
            "help": "Average the ascent gradient over processes, so that any number of them equals one. False: each"
            " process perturbs along its own gradient and saves that communication."
        },
    )
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Weight decay on BatchNorm and biases too, as in the paper."}
    )

    def __post_init__(self) -> None:
        """Check the AMP arguments, and let transformers check its own with the base optimizer's name."""
        optim = str(getattr(self.optim, "value", self.optim))
        base = "sgd" if optim == "amp" else optim.removeprefix(_PREFIX)
        if base not in (known := [o.value for o in OptimizerNames]):
            near = did_you_mean(optim, ["amp", *self._further_optims, *known, *(_PREFIX + name for name in known)])
            further = "".join(f", {name!r}" for name in self._further_optims)
            raise ValueError(
                f"optim {optim!r} is unknown{near}; choose 'amp'{further}, a stock name, or 'amp_' and one:"
                f" {', '.join(known)}"
            )
        if base == "sgd" and self.optim_args is None:
            self.optim_args = _SGD_ARGS
        check_policies(self.amp_batch_norm, self.amp_rng)
        make_policy(self.amp_ascent)
        self.optim = base
        if not self.use_cpu:
            refuse_processes_without_group()
        rejoin(timedelta(seconds=self.ddp_timeout), self.ddp_backend)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.optim = optim

    @property
    def uses_amp(self) -> bool:
        """Whether `optim` asks for Adversarial Model Perturbation."""
        return self.optim == "amp" or self.optim.startswith(_PREFIX)

    def base_arguments(self) -> TrainingArguments:
        """The same arguments with the stock name of the base optimizer in `optim`."""
        stock = copy.copy(self)
        stock.optim = OptimizerNames("sgd" if self.optim == "amp" else self.optim.removeprefix(_PREFIX))
        return stock

    def optimizer_kwargs(self) -> dict[str, Any]:
        """The AMP hyper-parameters, as :class:`amp_plugin.AMP` names them."""
        names = ("epsilon", "inner_lr", "inner_iter", "norm", "ascent", "parameters")
        return {name: getattr(self, _PREFIX + name) for name in names}
