"""The ball: a displacement of the weights that is bounded, measured and exactly undone.

Source: Zheng, Zhang, Mao, "Regularizing Neural Networks via Adversarial Model Perturbation", CVPR 2021,
https://arxiv.org/abs/2010.04925, section 4 (Algorithm 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.bucket import Ascent, Bucket, check_movable
from amp_plugin.core.compilation import not_compiled
from amp_plugin.core.move import CompiledMove, move
from amp_plugin.core.norms import all_true, local_tensor, norms_of, overall_norm
from amp_plugin.core.sharding import global_norms, local_shard, redistribute_like, split_of
from amp_plugin.core.shared_memory import clone_overlapping

Norm = Literal["tensor", "global"]
NORMS: tuple[str, ...] = get_args(Norm)

# Version counters of displaced weights. They start out of reach of the small numbers that ordinary changes count to,
# and leave room between them for the changes that a module makes to its own weights (nn.Embedding's max_norm).
_displacements = itertools.count(2**31, 64)


class Displacement(NamedTuple):
    """A point theta + delta that the weights have left for a while and can be put back to.

    Attributes:
        params: displaced parameters.
        moved: values of the parameters at theta + delta.
        theta_versions: autograd's version counters of the parameters at theta.
        moved_versions: version counters at theta + delta.
        finite: 0-d bool on the device, whether all gradients of the ascent were finite; None if there were none.
        flag: `finite` on its way to the host; None if the host is not told.
    """

    params: list[Tensor]
    moved: list[Tensor]
    theta_versions: list[int]
    moved_versions: list[int]
    finite: Tensor | None
    flag: AsyncScalar | None

    def was_finite(self) -> bool:
        """Return whether all gradients of the ascent were finite; wait for the device if that is not known yet."""
        return self.flag is None or bool(self.flag.value())


class Perturbation:
    """The ball: it moves parameters to theta + delta inside an L2 ball around theta, and back to the bits of theta.

    With ``norm="tensor"`` every parameter tensor has a ball of its own, as in the released code of the paper, which
    its tables were made with; with ``norm="global"`` there is one ball for all of them, as the paper's text says. Where
    the groups' radii differ, the global ball is an ellipsoid: a group's share is measured in units of its epsilon.

    Kernels are batched and the host never waits; statistics stay on the device until they are asked for. The ball costs
    one copy of the displaced weights, kept from step to step.

    Autograd's version counters tell the two points apart: each displacement has a number of its own, and theta has its
    old one back after :meth:`restore`. So a graph recorded at one point cannot silently be differentiated at another
    (autograd's own check fails), but can be at the same one.

    Args:
        norm: ``"tensor"`` or ``"global"``; default ``"tensor"``.
        tell_host: whether the host learns if an ascent was finite, without waiting; default True. If not,
            :attr:`finite` has it on the device.

    Attributes:
        disturbed: whether a gradient hook has changed displaced weights, which :meth:`restore` has undone.

    Raises:
        ValueError: the norm is unknown.
    """

    def __init__(self, norm: Norm = "tensor", *, tell_host: bool = True) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        self.norm: Norm = norm
        self._tell_host = tell_host
        self._backups: dict[int, Tensor] = {}  # by the parameter's identity, so that a replaced layer is let go
        self._displaced: dict[Tensor, int] = {}  # parameters with their version counter at theta
        self._moved_versions: list[int] = []  # version counters of the same parameters at theta + delta
        self.disturbed = False
        self._ratios: list[tuple[Tensor, float]] = []
        self._finite: Tensor | None = None
        self._flag: AsyncScalar | None = None
        self._move: Callable[[list[Tensor], list[Tensor], Tensor, Tensor], None] = move

    def compile(self) -> None:
        """Let `torch.compile` make the move to theta + delta from now on, in a few kernels instead of one a tensor.

        That is for a :class:`CapturedStep`, in which the device waits for nothing but kernels, and a ball around each
        tensor. The first ascent takes some seconds more. A copy of the optimizer is not compiled, as of a module.
        """
        self._move = CompiledMove()

    @property
    def active(self) -> bool:
        """Whether the weights are displaced now."""
        return bool(self._displaced)

    @not_compiled
    @torch.no_grad()
    def ascend(self, ascents: Iterable[Ascent], grad_scale: float | Tensor = 1.0) -> None:
        """Move to ``theta + project(delta + inner_lr * grad / grad_scale)``; the gradients are overwritten.

        A parameter that was displaced before but has no gradient now keeps its share of the displacement. If any
        gradient since theta was NaN or infinite, all parameters go to theta exactly, and :meth:`was_finite` is False.

        Args:
            ascents: one for each parameter.
            grad_scale: factor that the loss was multiplied by, > 0; default 1. A 0-d tensor costs no synchronisation.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter is a sum over processes that is still pending; no
                parameter has moved.
        """
        again = self.active
        if not again:
            self._finite = self._flag = None
            self._ratios = []
        buckets = self._buckets(ascents)
        if not buckets:
            return

        # 1. The steps: delta + inner_lr * grad / grad_scale. In the first ascent delta is 0, so the bare gradients stay
        # in b.deltas, and `factors` waits for the one multiplication in 3. The division by grad_scale comes last: so a
        # grad_scale that is a power of two changes no bit of the result.
        divisors = [b.beside(grad_scale) for b in buckets]
        factors: list[Any] = [b.inner_lr / d for b, d in zip(buckets, divisors, strict=True)]  # floats or 0-d tensors
        in_radii: list[Any] = [abs(b.inner_lr) / b.epsilon / d for b, d in zip(buckets, divisors, strict=True)]
        if again:
            for b, factor in zip(buckets, factors, strict=True):
                torch._foreach_mul_(b.deltas, factor.to(b.factor_dtype) if isinstance(factor, Tensor) else factor)
                torch._foreach_add_(b.deltas, b.params)
                torch._foreach_sub_(b.deltas, b.backups)
            factors, in_radii = [1.0 for _ in buckets], [1.0 / b.epsilon for b in buckets]

        # 2. Their lengths in radii: ||delta|| / epsilon, NaN or infinite where an entry of the tensor is.
        for b in buckets:
            self._weigh(b.deltas, b.backups)
        norms = [global_norms(norms_of(b.deltas), b.split) for b in buckets]
        for b in buckets:
            self._weigh(b.deltas, b.backups)
        ratios = [n * factor for n, factor in zip(norms, in_radii, strict=True)]
        overall = overall_norm(ratios) if self.norm == "global" else None

        # 3. Project, delta * min(1, epsilon / ||delta||), and move the weights; by 0 if anything was not finite, which
        # is what shrinks to NaN or to 0. So does a gradient that is too large for any factor of its type.
        lengths = [ratio if overall is None else overall.to(ratio.device) for ratio in ratios]
        shrinks = [
            self._share(length).mul_(factor).to(b.factor_dtype)
            for b, factor, length in zip(buckets, factors, lengths, strict=True)
        ]
        descends = [b.inner_lr < 0 and not again for b in buckets]
        finite = all_true([_are_factors(-s if down else s) for s, down in zip(shrinks, descends, strict=True)])
        if again and self._finite is not None:
            finite = finite & self._finite
        for b, shrink in zip(buckets, shrinks, strict=True):
            if again:
                torch._foreach_copy_(b.params, b.backups)
            self._move(b.params, b.deltas, shrink, finite.to(shrink.device))

        self._moved_versions = [next(_displacements)] * len(self._displaced)
        _set_versions(self._displaced, self._moved_versions)
        clear_weight_caches()
        self._ratios = [(ratio, b.epsilon) for b, ratio in zip(buckets, ratios, strict=True)]
        self._finite = finite
        self._flag = AsyncScalar(finite) if self._tell_host else None

    @not_compiled
    @torch.no_grad()
    def restore(self) -> None:
        """Put back the exact bits of theta, in place, if the weights are displaced."""
        if not self._displaced:
            return
        versions = zip(self._displaced, self._moved_versions, strict=False)  # fewer versions, if an ascent failed
        self.disturbed |= any(local_shard(p)._version != version and is_hooked(p) for p, version in versions)
        params = [local_tensor(p) for p in self._displaced]
        torch._foreach_copy_(params, [self._backups[id(p)] for p in self._displaced])
        # The parameter displaced first comes last: tensors in the same memory share a counter, and only the first saw
        # the counter of theta.
        _set_versions(reversed(self._displaced), reversed(self._displaced.values()))
        self._displaced = {}
        clear_weight_caches()

    def forget(self) -> None:
        """Take the weights for theta, where they are so although they were displaced: by kernels that never ran."""
        _set_versions(reversed(self._displaced), reversed(self._displaced.values()))
        self._displaced = {}
        clear_weight_caches()

    @not_compiled
    @torch.no_grad()
    def suspend(self) -> Displacement:
        """Restore, but keep theta + delta, so that :meth:`resume` can go back there."""
        params = list(self._displaced)
        plain = [local_tensor(p) for p in params]
        moved = [torch.empty_like(p) for p in plain]
        if params:
            torch._foreach_copy_(moved, plain)
        moved_versions = [local_shard(p)._version for p in params]
        self.restore()
        theta_versions = [local_shard(p)._version for p in params]
        return Displacement(params, moved, theta_versions, moved_versions, self._finite, self._flag)

    @not_compiled
    @torch.no_grad()
    def resume(self, displacement: Displacement) -> None:
        """Go back to a suspended theta + delta, to the exact bits.

        Raises:
            RuntimeError: theta has changed since, or the weights are displaced already; nothing has moved.
        """
        if self.active:
            raise RuntimeError("the weights are at another theta + delta already")
        params, moved, theta_versions, moved_versions, *_ = displacement
        if [local_shard(p)._version for p in params] != theta_versions:
            raise RuntimeError("the weights have changed since they were perturbed")
        self._displaced = dict(zip(params, theta_versions, strict=True))
        if params:
            torch._foreach_copy_([local_tensor(p) for p in params], moved)
        self._moved_versions = moved_versions
        _set_versions(params, moved_versions)
        clear_weight_caches()

    def check_undisturbed(self) -> None:
        """Raise RuntimeError, once, if something has changed the weights while they were away from theta."""
        disturbed, self.disturbed = self.disturbed, False
        if disturbed:
            raise RuntimeError(
                "a gradient hook changed the weights while they were perturbed, and the change was undone: an optimizer"
                " that steps inside the backward pass cannot be used with AMP; let AMP's base_optimizer make the step"
            )

    @property
    def outcome(self) -> tuple[Any, ...]:
        """What the last ascents have found: a door that replays a captured step sets it to what its graph writes."""
        return self._ratios, self._finite, self._flag

    @outcome.setter
    def outcome(self, outcome: tuple[Any, ...]) -> None:
        self._ratios, self._finite, self._flag = outcome

    @property
    def finite(self) -> Tensor | None:
        """Whether all gradients since theta were finite, a 0-d bool on the device; None if there was none."""
        return self._finite

    def was_finite(self) -> bool:
        """Return :attr:`finite` on the host, waiting for the device if need be; True if the host is not told."""
        return self._flag is None or bool(self._flag.value())

    def statistics(self) -> dict[str, Tensor]:
        """Return measures of the last ascent step, 0-d tensors on the device by name; nothing before the first step.

        ``perturbation_norm`` is the L2 norm of delta over all parameters, ``clipped`` the fraction of parameter tensors
        that the ball held back (0 or 1 with ``norm="global"``).
        """
        if not self._ratios:
            return {}
        assert self._finite is not None
        device = self._ratios[0][0].device
        # The weights stay at theta where the ascent was not finite: at the length 0.
        ratios = [torch.where(self._finite.to(ratio.device), ratio, 0.0).to(device) for ratio, _ in self._ratios]
        length = overall_norm(ratios) if self.norm == "global" else torch.cat(ratios)
        shares = [self._share(length)] * len(ratios) if length.dim() == 0 else [self._share(ratio) for ratio in ratios]
        radii = [epsilon for _, epsilon in self._ratios]
        norm = overall_norm([r * share * radius for r, share, radius in zip(ratios, shares, radii, strict=True)])
        return {"perturbation_norm": norm, "clipped": (length > 1.0).float().mean()}

    def _share(self, length: Tensor) -> Tensor:
        """Return min(1, 1 / length), which brings a step of this length, in radii, into the ball; a new tensor."""
        return length.reciprocal().clamp_(max=1.0)

    def _weigh(self, deltas: list[Tensor], theta: list[Tensor]) -> None:
        """Do nothing; a subclass whose ball is an ellipsoid (ASAM) multiplies the steps by its axes here.

        This is called twice in an ascent: before the steps are measured, and after.
        """

    def _buckets(self, ascents: Iterable[Ascent]) -> list[Bucket]:
        """Back up parameters that are not displaced yet; group all by device, dtype, hyper-parameters and sharding."""
        buckets: dict[tuple[object, ...], Bucket] = {}
        entering: dict[Tensor, int] = {}
        known, ascents = len(self._backups), list(ascents)
        for param, grad, inner_lr, epsilon in ascents:
            check_movable(param, grad)
            plain = local_tensor(param)
            if param not in self._displaced:
                if grad is None:
                    continue
                entering[param] = plain._version
            split = split_of(param)
            delta = torch.zeros_like(plain) if grad is None else local_tensor(redistribute_like(grad, param))
            key = (plain.device, plain.dtype, delta.dtype, inner_lr, epsilon, split)
            bucket = buckets.get(key)
            if bucket is None:
                bucket = buckets[key] = Bucket(inner_lr, epsilon, split, [], [], [])
            bucket.params.append(plain)
            bucket.backups.append(self._backup(param, plain))
            bucket.deltas.append(delta)
        if len(self._backups) > known:  # new parameters, perhaps in the place of others
            members = {*map(id, self._displaced), *(id(ascent.param) for ascent in ascents)}
            self._backups = {key: backup for key, backup in self._backups.items() if key in members}
        clone_overlapping([b.deltas for b in buckets.values()])
        if entering:
            torch._foreach_copy_([self._backups[id(p)] for p in entering], [local_tensor(p) for p in entering])
            self._displaced.update(entering)  # only now: restore() must never meet a backup that is not filled
        return list(buckets.values())

    def _backup(self, param: Tensor, like: Tensor) -> Tensor:
        """Return the buffer that keeps theta of a parameter, made at first use and when the parameter has changed.

        The buffer is not filled, so the one of a parameter that is gone serves another one with its identity as well.
        """
        backup = self._backups.get(id(param))
        if backup is None or backup.shape != like.shape or backup.dtype != like.dtype or backup.device != like.device:
            backup = self._backups[id(param)] = torch.empty_like(like)
        return backup


def clear_weight_caches() -> None:
    """Drop what torch keeps of values computed from weights, which have moved: casts of autocast, parametrizations."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def is_hooked(param: Tensor) -> bool:
    """Return whether a parameter's gradient sets something off, as it does for optimizers that step in backward."""
    hooks = [*(param._post_accumulate_grad_hooks or {}).values(), *(param._backward_hooks or {}).values()]
    return not all(getattr(hook, "only_looks", False) for hook in hooks)


def _are_factors(shrink: Tensor) -> Tensor:
    """Return a 0-d bool, whether all entries are positive numbers, of which float32 keeps at least 13 bits."""
    return shrink.min() >= torch.finfo(shrink.dtype).smallest_normal / 1024


def _set_versions(params: Iterable[Tensor], versions: Iterable[int]) -> None:
    torch._C._autograd._unsafe_set_version_counter(tuple(map(local_shard, params)), tuple(versions))
