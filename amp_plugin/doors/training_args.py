"""AMP's options for the arguments of any Trainer: ``--optim amp_adamw_torch --amp_epsilon 0.5``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from amp_plugin.core.captured_call import can_capture
from amp_plugin.core.policies import AscentPolicy, make_policy
from amp_plugin.core.replay import check_policies
from amp_plugin.suggest import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

# The base optimizer of the paper.
SGD_ARGS = "momentum=0.9,nesterov=True"
_PREFIX = "amp_"
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


@dataclass
class _AMPOptions:
    """The options that AMP adds; no field of `transformers.TrainingArguments` is among them."""

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
            " 'split(0.25)', 'every(2)', 'window(0.5, 1.0)', 'stale', 'momentum', 'adaptive(0.0)', or"
            " several, separated by commas."
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
    amp_sync_ascent: bool = field(
        default=True,
        metadata={
            "help": "Average the ascent gradient over processes, so that any number of them equals one. False: each"
            " process perturbs along its own gradient and saves that communication."
        },
    )
    amp_capture: bool = field(
        default=False,
        metadata={
            "help": "On CUDA: replay each step as CUDA graphs, without Python between the kernels. The batches need a"
            " fixed shape, the model a code path that does not depend on values."
        },
    )
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Weight decay on BatchNorm and biases too, as in the paper."}
    )


# Not a dataclass: as one, it would list all fields of TrainingArguments with the stock defaults as its own, and in
# class MyConfig(AMPArguments, TheirConfig) these would replace the defaults of TheirConfig.
class AMPArguments(_AMPOptions, TrainingArguments):
    """AMP's options, to be combined with the arguments of any Trainer; see :class:`amp_plugin.AMPMixin`.

    ::

        @dataclass
        class MySFTConfig(SFTConfig, AMPArguments):
            '''SFTConfig with AMP.'''

        args = MySFTConfig("out", optim="amp", amp_epsilon=0.5)

    The bases may stand in either order. All defaults of SFTConfig stay, so AMP has to be asked for: ``optim="amp"`` is
    AMP around SGD with Nesterov momentum 0.9, and e.g. ``optim="amp_adamw_torch"`` is AMP around another stock
    optimizer. AMP here is Adversarial Model Perturbation, not mixed precision.

    Raises:
        TypeError: The combined class is not decorated with ``@dataclass``.
        ValueError: The base optimizer or a policy is unknown. The optimizer itself checks its hyper-parameters.
    """

    # The annotation makes no dataclass field, so TheirConfig's default of `optim` stays; but HfArgumentParser reads the
    # annotation, and then takes names that are not among transformers' own.
    optim: str
    compares_with_amp: ClassVar[bool] = False  # whether a training without AMP may have AMP's options, and says nothing
    _further_optims: ClassVar[tuple[str, ...]] = ()  # names of optimizers that a subclass adds

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse a class that has not the fields of both bases."""
        if not {"output_dir", "amp_epsilon"} <= {f.name for f in fields(cls)}:
            raise TypeError(
                f"{cls.__name__} has not the fields of all its bases; AMPArguments is one base of a dataclass:"
                " @dataclass class MyConfig(TheirConfig, AMPArguments)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check AMP's options, and let transformers check the others with words that it knows."""
        known = [o.value for o in OptimizerNames]
        if self.base_optim not in known:
            optim = self.optim
            near = did_you_mean(optim, ["amp", *self._further_optims, *known, *(_PREFIX + name for name in known)])
            further = "".join(f", {name!r}" for name in self._further_optims)
            raise ValueError(
                f"optim {optim!r} is unknown{near}; choose 'amp'{further}, a stock name, or 'amp_' and one:"
                f" {', '.join(known)}"
            )
        if self.uses_amp and self.base_optim == "sgd" and self.optim_args is None:
            self.optim_args = SGD_ARGS
        check_policies(self.amp_batch_norm, self.amp_rng)
        policy = make_policy(self.amp_ascent)
        if self.amp_capture:
            self._check_capture(policy)
        options = [f for f in fields(_AMPOptions) if f.name.startswith(_PREFIX)]
        given = [f.name for f in options if getattr(self, f.name) != f.default]
        if given and not self.uses_amp and not self.compares_with_amp:
            raise ValueError(
                f"{', '.join(given)} would have no effect: optim is {self.optim!r}, which trains without Adversarial"
                f" Model Perturbation; for AMP around it say optim='amp_{self.optim}', else leave {given[0]} out"
            )
        stock = self.stock_values()
        asked = {name: getattr(self, name) for name in stock}
        vars(self).update(stock)
        super().__post_init__()  # type: ignore[no-untyped-call]
        vars(self).update(asked)
        self.optim = str(getattr(self.optim, "value", self.optim))  # transformers makes an enum of a stock name

    @property
    def uses_amp(self) -> bool:
        """Whether `optim` asks for Adversarial Model Perturbation."""
        return self.optim == "amp" or self.optim.startswith(_PREFIX)

    @property
    def base_optim(self) -> str:
        """Stock name of the optimizer that makes the descent: the one inside AMP, or `optim` itself."""
        return "sgd" if self.optim == "amp" else self.optim.removeprefix(_PREFIX)

    @property
    def captures(self) -> bool:
        """Whether the steps are captured: `amp_capture` asks for it, and one device that can is trained on."""
        return self.amp_capture and can_capture(self.device) and self.n_gpu <= 1

    def _check_capture(self, policy: AscentPolicy) -> None:
        """Refuse with `amp_capture` what the host has a say in."""
        reasons = {
            f"amp_ascent={self.amp_ascent!r} takes steps of several kinds; use 'full', 'subset(0.25)' or"
            " 'split(0.25)'": self.uses_amp and not policy.is_static,
            "fp16 lets the host decide which steps are made; use bf16=True": self.fp16,
            f"torch_compile_mode={self.torch_compile_mode!r} captures graphs of its own; leave it out": (
                self.torch_compile_mode in _OWN_GRAPHS
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"amp_capture: {reason}")

    def stock_values(self) -> dict[str, Any]:
        """Return the values, by the name of the option, that stand for ours wherever transformers reads the arguments.

        A subclass that gives an option of transformers a value which transformers does not know adds a stand-in here.
        """
        return {} if self.base_optim == self.optim else {"optim": OptimizerNames(self.base_optim)}

    def base_arguments(self) -> TrainingArguments:
        """Return a copy that asks for the base optimizer alone, in words that transformers knows."""
        stock = copy.copy(self)
        vars(stock).update(self.stock_values())
        return stock

    def optimizer_kwargs(self) -> dict[str, Any]:
        """Return AMP's hyper-parameters under the names that :class:`amp_plugin.AMP` has for them."""
        names = ("epsilon", "inner_lr", "inner_iter", "norm", "ascent", "parameters")
        return {name: getattr(self, _PREFIX + name) for name in names}
