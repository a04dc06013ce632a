"""What an ascent moves: parameters with their gradients, in buckets that one batched kernel can treat together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amp_plugin.core.norms import norm_dtype
from amp_plugin.core.sharding import Split


class Ascent(NamedTuple):
    """An `Ascent` says what one parameter contributes to an ascent step.

    Attributes:
        param: parameter of any shape; complex numbers count as pairs of reals.
        grad: gradient of the same shape, which the step **overwrites**; None if the parameter received none.
        inner_lr: step length (zeta in the paper), > 0; or < 0 to go downhill, the worst direction when maximising.
        epsilon: radius of the ball, in the units of the weights, > 0.
    """

    param: Tensor
    grad: Tensor | None
    inner_lr: float
    epsilon: float


class Bucket(NamedTuple):
    """Parameters that one batched kernel can treat together, as local real tensors.

    Attributes:
        inner_lr: step length of all these parameters.
        epsilon: radius of their balls.
        split: processes that the parameters are split between; None if each process has all of them.
        params: values of the parameters, in their own storage.
        backups: copies of theta.
        deltas: gradients at first, then steps, then displacements, in the storage of the gradients.
    """

    inner_lr: float
    epsilon: float
    split: Split | None
    params: list[Tensor]
    backups: list[Tensor]
    deltas: list[Tensor]

    @property
    def factor_dtype(self) -> torch.dtype:
        """The numbers that deltas are multiplied by have this type: that of the deltas, or float32 for 16-bit ones."""
        return torch.promote_types(self.deltas[0].dtype, torch.float32)

    def beside(self, grad_scale: float | Tensor) -> float | Tensor:
        """Return the scale, if it is a tensor, on the device of the gradients and in the type of their norms."""
        if isinstance(grad_scale, Tensor):
            device = self.deltas[0].device
            return grad_scale.to(device, torch.promote_types(self.factor_dtype, norm_dtype(device)))
        return grad_scale


def check_movable(param: Tensor, grad: Tensor | None) -> None:
    """Raise RuntimeError if a parameter is a piece of FSDP1's flat buffer, or its gradient is sparse."""
    if hasattr(param, "_fsdp_flattened"):  # its norm would be that of this process's piece of a flat buffer
        raise RuntimeError("AMP does not support FullyShardedDataParallel (FSDP1); use fully_shard (FSDP2) or DDP")
    if grad is not None and grad.layout != torch.strided:
        raise RuntimeError(
            f"AMP does not support sparse gradients (parameter of shape {tuple(param.shape)}); make them dense, e.g."
            " nn.Embedding(sparse=False), or put the parameter in a group with epsilon=0"
        )
