"""Define the options of the methods that AMP is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from amp_plugin import AMP, AMPTrainingArguments
from amp_plugin.core.perturbation import NORMS
from amp_plugin.train.methods.optimizers import BASELINES, RMP
from amp_plugin.train.ranges import check_ranges
from amp_plugin.train.stock_options import check_word
from amp_plugin.trainer.described import BALLS

# These options change the training loss, whatever the optimizer.
OBJECTIVES = ("label_smoothing_factor", "flood_level", "mixup_alpha", "adversarial_epsilon")
_DEFAULT_RADII = {"rmp": 0.1, "sam": 0.05, "asam": 0.5}


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class MethodArguments(AMPTrainingArguments):
    """Choose another method of the paper's tables to train with."""

    compares_with_amp: ClassVar[bool] = True  # a recipe's options stay when --optim sgd runs the job without AMP

    _further_optims = tuple(BASELINES)

    optim: str = option(
        "amp",
        "'amp': Adversarial Model Perturbation around SGD; 'amp_NAME': around any optimizer that the stock"
        " Trainer knows, e.g. amp_adamw_torch; a stock name alone, e.g. sgd, to train without it; or a baseline"
        " around SGD: rmp, sam, asam. SGD gets momentum=0.9,nesterov=True unless --optim_args says otherwise.",
    )
    flood_level: float | None = option(None, "Flooding: keep the training loss at this level; 0.02 in the paper.")
    mixup_alpha: float | None = option(None, "mixup: mix pairs of images, in proportions from Beta(ALPHA, ALPHA).")
    adversarial_epsilon: float | None = option(
        None,
        "Adversarial training: move every pixel so far against the label (FGSM), of pixels in [0, 1];"
        " 1/255 = 0.00392156862745098 in the paper. One more pass for each pass.",
    )
    rmp_epsilon: float | None = option(
        None, "Radius of the ball of --optim rmp, random model perturbation. Default: 0.1."
    )
    sam_rho: float | None = option(None, "Radius of the ball of --optim sam or asam. Default: 0.05, of asam 0.5.")

    def __post_init__(self) -> None:
        """Check the options, and settle the radius of a baseline's ball."""
        optim = str(getattr(self.optim, "value", self.optim))
        check_ranges(self)
        check_word("amp_norm", self.amp_norm, NORMS)
        if optim.partition("_")[0] in BASELINES and optim not in BASELINES:
            raise ValueError(
                f"optim {optim!r} is unknown: {', '.join(BASELINES)} are around SGD only; AMP is around any"
            )
        radius = BALLS.get(optim)
        for name in dict.fromkeys(BALLS.values()):
            if name != radius and getattr(self, name) is not None:
                optims = " or ".join(baseline for baseline, theirs in BALLS.items() if theirs == name)
                raise ValueError(f"--{name} is for --optim {optims}, but --optim is {optim}")
        if radius is not None:
            for name, paper in (("amp_inner_iter", 1), ("amp_ascent", "full"), ("amp_parameters", None)):
                if getattr(self, name) != paper:
                    said = f"--{name} is for AMP, but --optim is {optim}, which perturbs all weights once a step"
                    raise ValueError(said)
            if getattr(self, radius) is None:
                setattr(self, radius, _DEFAULT_RADII[optim])
        super().__post_init__()

    @property
    def baseline(self) -> type[AMP] | None:
        """Return the optimizer's class if AMP is compared with this optimizer, else None."""
        return BASELINES.get(self.optim)

    @property
    def passes_per_loss(self) -> int:
        """Count the forward and backward passes that a training loss and its gradient take."""
        return 1 if self.adversarial_epsilon is None else 2

    @property
    def base_optim(self) -> str:
        """Stock name of the optimizer that makes the descent; the baselines are around SGD."""
        return super().base_optim if self.baseline is None else "sgd"

    def optimizer_kwargs(self) -> dict[str, Any]:
        """Return the hyper-parameters of AMP or of the baseline, as :class:`amp_plugin.AMP` names them."""
        if self.baseline is None:
            return super().optimizer_kwargs()
        further = {"norm": self.amp_norm, "seed": self.seed} if self.baseline is RMP else {"norm": "global"}
        return {"epsilon": getattr(self, BALLS[self.optim]), **further}
