"""Options of the methods that AMP is compared with."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from amp_plugin import AMP, AMPTrainingArguments
from amp_plugin.train.methods.optimizers import RIVALS, RMP

# Options that change the training loss, whatever the optimizer.
OBJECTIVES = ("label_smoothing_factor", "flood_level", "mixup_alpha", "adversarial_epsilon")
# The radius of each rival optimizer's ball: its option and that option's default.
RADII = {"rmp": ("rmp_epsilon", 0.1), "sam": ("sam_rho", 0.05), "asam": ("sam_rho", 0.5)}


@dataclass
class MethodArguments(AMPTrainingArguments):
    """Whether and how to train with another method of the paper's tables.

    Raises:
        ValueError: a value out of range, or options that do not go together.
    """

    _further_optims = tuple(RIVALS)

    optim: str = field(
        default="amp",
        metadata={
            "help": "'amp': Adversarial Model Perturbation around SGD; 'amp_NAME': around any optimizer that the stock"
            " Trainer knows, e.g. amp_adamw_torch; a stock name alone, e.g. sgd, to train without it; or a rival around"
            " SGD: rmp, sam, asam. SGD gets momentum=0.9,nesterov=True unless --optim_args says otherwise."
        },
    )
    flood_level: float | None = field(
        default=None, metadata={"help": "Flooding: keep the training loss at this level; 0.02 in the paper."}
    )
    mixup_alpha: float | None = field(
        default=None, metadata={"help": "mixup: mix pairs of images, in proportions from Beta(ALPHA, ALPHA)."}
    )
    adversarial_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Adversarial training: move every pixel so far against the label (FGSM), of pixels in [0, 1];"
            " 1/255 = 0.00392156862745098 in the paper. One more pass for each pass."
        },
    )
    rmp_epsilon: float | None = field(
        default=None,
        metadata={"help": "Radius of the ball of --optim rmp, random model perturbation. Default: 0.1."},
    )
    sam_rho: float | None = field(
        default=None, metadata={"help": "Radius of the ball of --optim sam or asam. Default: 0.05, of asam 0.5."}
    )

    def __post_init__(self) -> None:
        """Check the options, and settle the radius of a rival's ball."""
        optim = str(getattr(self.optim, "value", self.optim))
        _check_range("flood_level", self.flood_level, 0.0, math.inf, zero=True)
        _check_range("mixup_alpha", self.mixup_alpha, 0.0, math.inf)
        _check_range("adversarial_epsilon", self.adversarial_epsilon, 0.0, 1.0)
        if optim.partition("_")[0] in RIVALS and optim not in RIVALS:
            raise ValueError(f"optim {optim!r} is unknown: {', '.join(RIVALS)} are around SGD only; AMP is around any")
        option, default = RADII.get(optim, (None, None))
        for name in dict.fromkeys(name for name, _ in RADII.values()):
            _check_range(name, getattr(self, name), 0.0, math.inf, zero=True)
            if name != option and getattr(self, name) is not None:
                optims = " or ".join(rival for rival, (theirs, _) in RADII.items() if theirs == name)
                raise ValueError(f"--{name} is for --optim {optims}, but --optim is {optim}")
        if option is None:
            super().__post_init__()
            return
        if self.amp_inner_iter != 1:
            raise ValueError(f"--optim {optim} perturbs once a step; leave --amp_inner_iter at 1, it is for AMP")
        if getattr(self, option) is None:
            setattr(self, option, default)
        self.optim = "amp"
        super().__post_init__()
        self.optim = optim

    @property
    def rival(self) -> type[AMP] | None:
        """The optimizer, if it is one of those that AMP is compared with."""
        return RIVALS.get(self.optim)

    def base_arguments(self) -> TrainingArguments:
        """The same arguments with the stock name of the base optimizer in `optim`."""
        if self.rival is None:
            return super().base_arguments()
        stock = copy.copy(self)
        stock.optim = OptimizerNames.SGD
        return stock

    def optimizer_kwargs(self) -> dict[str, Any]:
        """The hyper-parameters of AMP or its rival, as :class:`amp_plugin.AMP` names them."""
        if self.rival is None:
            return super().optimizer_kwargs()
        return {
            "epsilon": getattr(self, RADII[self.optim][0]),
            "norm": self.amp_norm if self.rival is RMP else "global",
        }


def _check_range(name: str, value: float | None, low: float, high: float, *, zero: bool = False) -> None:
    if value is not None and not (low < value < high or (zero and value == low)):
        below = "finite" if math.isinf(high) else f"below {high:g}"
        raise ValueError(
            f"--{name} must be {'at least' if zero else 'above'} {low:g} and {below}, got {value}; leave it out to"
            " train without it"
        )
