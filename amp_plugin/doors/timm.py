"""AMP in timm's optimizer factory: ``--opt amp``, ``create_optimizer_v2(model, opt="amp", ...)``.

The names have no underscore, because the factory looks up only what follows the last underscore: ``amp_adamw`` would
silently be plain AdamW. ``lookahead_`` is a prefix of the factory's own.
"""

from __future__ import annotations

from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import Tensor
from torch.optim.optimizer import ParamsT

from amp_plugin.core.optimizer import AMP
from amp_plugin.core.perturbation import Norm


class _AdamFamily(AMP):
    """AMP around a base optimizer with `betas` and `eps`, which stand in the signature because timm reads it."""

    base: str

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        epsilon: float = 0.5,
        inner_lr: float = 1.0,
        inner_iter: int = 1,
        norm: Norm = "tensor",
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        if eps is not None:
            kwargs["eps"] = eps
        super().__init__(
            params,
            lr,
            epsilon,
            inner_lr,
            inner_iter,
            self.base,
            norm,
            betas=betas,
            weight_decay=weight_decay,
            **kwargs,
        )


class AMPAdamW(_AdamFamily):
    """AMP around `torch.optim.AdamW`, with the arguments of :class:`amp_plugin.AMP` and of AdamW."""

    base = "adamw"


class AMPLamb(_AdamFamily):
    """AMP around `timm.optim.Lamb`, with the arguments of :class:`amp_plugin.AMP` and of Lamb."""

    base = "lamb"


_OPTIMIZERS = (
    OptimInfo(
        name="amp",
        opt_class=AMP,
        description="Adversarial Model Perturbation around SGD with Nesterov momentum, or any base_optimizer",
        has_eps=False,
        has_momentum=True,
        defaults={"base_optimizer": "sgd"},
    ),
    OptimInfo(
        name="ampadamw",
        opt_class=AMPAdamW,
        description="Adversarial Model Perturbation around AdamW",
        has_betas=True,
    ),
    OptimInfo(
        name="amplamb",
        opt_class=AMPLamb,
        description="Adversarial Model Perturbation around LAMB",
        has_betas=True,
    ),
)


def register_optimizers() -> None:
    """Add AMP to timm's registry; a second call is harmless."""
    for info in _OPTIMIZERS:
        default_registry.register(info)
