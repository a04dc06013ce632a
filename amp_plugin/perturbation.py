"""The ball: a displacement of the weights that is bounded, measured and exactly undone.

Source: Zheng, Zhang, Mao, "Regularizing Neural Networks via Adversarial Model Perturbation", CVPR 2021,
https://arxiv.org/abs/2010.04925, section 4 (Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Norm = Literal["tensor", "global"]
NORMS: tuple[str, ...] = get_args(Norm)

# A float of that many bytes, read as an integer: multiplying the bits by 0 clears even NaN and inf.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LOW_PRECISION = (torch.float16, torch.bfloat16)


class Ascent(NamedTuple):
    """What one parameter contributes to an ascent step.

    Attributes:
        param: the parameter, of any shape; complex numbers count as pairs of reals.
        grad: its gradient, same shape, or None if it received none in this pass. **Consumed**: overwritten.
        inner_lr: step length (zeta in the paper), > 0; < 0 to go downhill, the worst direction when maximising.
        epsilon: radius of the ball, in the units of the weights, > 0.
    """

    param: Tensor
    grad: Tensor | None
    inner_lr: float
    epsilon: float


class _Bucket(NamedTuple):
    """Parameters that one batched kernel can treat together, as plain local real tensors."""

    inner_lr: float
    epsilon: float
    params: list[Tensor]
    backups: list[Tensor]
    deltas: list[Tensor]


class Perturbation:
    """Moves parameters to theta + delta inside an L2 ball around theta, and back to the exact bits of theta.

    With ``norm="tensor"`` every parameter tensor has a ball of its own (what the released code of the paper
    does and its tables were made with); with ``norm="global"`` there is one ball for all of them (what the
    paper's text says). Where the groups' radii differ, the global ball is an ellipsoid: a group's share is
    measured in units of its own epsilon.

    Batched kernels throughout, no host synchronisation; statistics stay on the device until asked for.
    Memory: one copy of the displaced weights, kept from step to step.
    """

    def __init__(self, norm: Norm = "tensor") -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        self.norm: Norm = norm
        self._backups: dict[Tensor, Tensor] = {}
        self._displaced: dict[Tensor, None] = {}
        self._ratios: list[tuple[Tensor, float]] = []
        self._finite: Tensor | None = None
        self._flag: _HostFlag | None = None

    @property
    def active(self) -> bool:
        """Whether the weights are displaced now."""
        return bool(self._displaced)

    @torch.no_grad()
    def ascend(self, ascents: Iterable[Ascent]) -> None:
        """Move to ``theta + project(delta + inner_lr * grad)``; gradients are consumed.

        A parameter displaced earlier but without a gradient now keeps its share of the displacement. If any
        gradient since theta was NaN or infinite, all parameters go to theta exactly, and :meth:`was_finite` is False.

        Raises:
            RuntimeError: a gradient is sparse or a parameter sharded; no parameter has moved.
        """
        again = self.active
        if not again:
            self._finite = self._flag = None
        buckets = self._buckets(ascents)
        if not buckets:
            return
        if again:  # delta = (theta + delta) - theta, plus the new step
            for b in buckets:
                torch._foreach_mul_(b.deltas, b.inner_lr)
                torch._foreach_add_(b.deltas, b.params)
                torch._foreach_sub_(b.deltas, b.backups)
        scales = [1.0 if again else b.inner_lr for b in buckets]
        ratios = [_norms(b.deltas) * (abs(scale) / b.epsilon) for b, scale in zip(buckets, scales, strict=True)]
        finite = _all_finite(ratios)
        if again and self._finite is not None:
            finite = finite & self._finite
        overall = _combine(ratios) if self.norm == "global" else None
        for b, scale, ratio in zip(buckets, scales, ratios, strict=True):
            shrink = (ratio if overall is None else overall.to(ratio.device)).reciprocal().clamp_(max=1.0).mul_(scale)
            ok = finite.to(ratio.device)
            shrink = torch.where(ok, shrink, 0.0)
            bits = _BITS[b.deltas[0].element_size()]
            torch._foreach_mul_([d.view(bits) for d in b.deltas], ok.to(bits))
            if overall is None:
                torch._foreach_mul_(b.deltas, shrink.unbind())
            else:
                torch._foreach_mul_(b.deltas, shrink)
            if again:
                torch._foreach_copy_(b.params, b.backups)
            torch._foreach_add_(b.params, b.deltas)
        torch.clear_autocast_cache()
        self._ratios = [(ratio, b.epsilon) for b, ratio in zip(buckets, ratios, strict=True)]
        self._finite = finite
        self._flag = _HostFlag(finite)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the exact bits of theta, in place; nothing to do if the weights are not displaced."""
        if not self._displaced:
            return
        params = [_plain(p) for p in self._displaced]
        torch._foreach_copy_(params, [self._backups[p] for p in self._displaced])
        self._displaced = {}
        torch.clear_autocast_cache()

    def was_finite(self) -> bool:
        """Whether all gradients since theta were finite, or none was seen."""
        return self._flag is None or self._flag.value()

    def statistics(self) -> dict[str, Tensor]:
        """Measures of the last ascent step, as 0-d tensors on the device; empty before the first.

        ``perturbation_norm`` is the L2 norm of delta over all parameters; ``clipped`` the fraction of
        parameter tensors that the ball held back (with ``norm="global"``: 0 or 1).
        """
        if not self._ratios:
            return {}
        device = self._ratios[0][0].device
        ratios = torch.cat([ratio.to(device) for ratio, _ in self._ratios])
        radii = torch.cat([ratio.new_full(ratio.shape, epsilon, device=device) for ratio, epsilon in self._ratios])
        length = torch.linalg.vector_norm(ratios) if self.norm == "global" else ratios
        norm = torch.linalg.vector_norm(radii * ratios / length.clamp(min=1.0))
        clipped = (length > 1.0).float().mean()
        assert self._finite is not None
        moved = self._finite.to(device)  # if not, the weights stayed at theta
        return {"perturbation_norm": torch.where(moved, norm, 0.0), "clipped": torch.where(moved, clipped, 0.0)}

    def _buckets(self, ascents: Iterable[Ascent]) -> list[_Bucket]:
        """Back up parameters that are not displaced yet; group by device, dtype and hyper-parameters."""
        buckets: dict[tuple[object, ...], _Bucket] = {}
        entering: dict[Tensor, None] = {}
        for param, grad, inner_lr, epsilon in ascents:
            _refuse_what_cannot_move(param, grad)
            if param not in self._displaced:
                if grad is None:
                    continue
                entering[param] = None
            plain = _plain(param)
            key = (plain.device, plain.dtype, inner_lr, epsilon)
            bucket = buckets.setdefault(key, _Bucket(inner_lr, epsilon, [], [], []))
            bucket.params.append(plain)
            bucket.backups.append(self._backup(param, plain))
            bucket.deltas.append(torch.zeros_like(plain) if grad is None else _plain(grad))
        if entering:
            torch._foreach_copy_([self._backups[p] for p in entering], [_plain(p) for p in entering])
            self._displaced.update(entering)  # only now: restore() must never meet a backup that is not filled
        return list(buckets.values())

    def _backup(self, param: Tensor, like: Tensor) -> Tensor:
        """The buffer that keeps theta of this parameter; made when first needed or when the parameter changed."""
        backup = self._backups.get(param)
        if backup is None or (backup.shape, backup.dtype, backup.device) != (
            like.shape,
            like.dtype,
            like.device,
        ):
            backup = self._backups[param] = torch.empty_like(like)
        return backup


class _HostFlag:
    """A device flag on its way to the host: copied without waiting, read when it has long arrived."""

    def __init__(self, flag: Tensor) -> None:
        self._event: torch.Event | None = None
        if flag.device.type == "cpu":
            self._host = flag
        else:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.Event(flag.device)
            self._event.record()

    def value(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host.tolist())


def _refuse_what_cannot_move(param: Tensor, grad: Tensor | None) -> None:
    if hasattr(param, "device_mesh"):
        raise RuntimeError("AMP does not support sharded parameters (FSDP, DTensor) yet; use DDP instead")
    if grad is not None and grad.layout != torch.strided:
        raise RuntimeError(
            f"AMP does not support sparse gradients (parameter of shape {tuple(param.shape)}); make them dense, e.g."
            " nn.Embedding(sparse=False), or put the parameter in a group with epsilon=0"
        )


def _plain(tensor: Tensor) -> Tensor:
    """The same storage as a real tensor."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _norms(tensors: list[Tensor]) -> Tensor:
    """L2 norm of each tensor, as one vector; half precision is summed in float32, which cannot overflow."""
    dtype = torch.float32 if tensors[0].dtype in LOW_PRECISION else None
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def _combine(norms: Sequence[Tensor]) -> Tensor:
    """L2 norm over all vectors, which may live on several devices; on the first one's device."""
    device = norms[0].device
    together = torch.cat([n.to(device) for n in norms]) if len(norms) > 1 else norms[0]
    norm: Tensor = torch.linalg.vector_norm(together)
    return norm


def _all_finite(norms: Sequence[Tensor]) -> Tensor:
    """0-d bool: no NaN and no infinity in any vector (each entry is >= 0, so one sum tells)."""
    device = norms[0].device
    finite: Tensor = sum((n.sum().to(device) for n in norms[1:]), norms[0].sum()) < torch.inf
    return finite
