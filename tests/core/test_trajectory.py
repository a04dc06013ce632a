"""AMP against the float64 reference: PreActResNet on real CIFAR-10 images, 20 steps, weights compared at each."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from problems import closure_for
from reference import Step, amp_trajectory
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, ExtraPasses
from amp_plugin.data import load_images

STEPS, BATCH = 20, 12
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}


@functools.cache
def problem(dtype: torch.dtype) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A PreActResNet and its batches, both in float64 (float32 runs convert them).

    For float32 the activations are smooth: rounding moves about one ReLU in a million across its kink, and each of
    those changes the gradient by a finite amount, whatever the optimizer does.
    """
    torch.manual_seed(0)
    model = timm.create_model("preactresnet18", width=4, layers=(1, 1, 1, 1)).double()
    if dtype == torch.float32:
        for block in list(model.modules()):
            for name, child in block.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(block, name, nn.SiLU())
    split = load_images("cifar10_sample").train
    images = torch.tensor(split.images[: STEPS * BATCH]).permute(0, 3, 1, 2).double().div(127.5).sub(1)
    labels = torch.tensor(split.labels[: STEPS * BATCH])
    return model, list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


@functools.cache
def reference(dtype: torch.dtype, base: str, norm: Any, inner_iter: int, batch_norm: Any) -> list[Step]:
    model, batches = problem(dtype)
    return amp_trajectory(
        model,
        F.cross_entropy,
        batches,
        lr=0.005,
        epsilon=0.05,
        inner_lr=0.5,
        inner_iter=inner_iter,
        norm=norm,
        batch_norm=batch_norm,
        **BASES[base],
    )


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors together."""
    difference = torch.cat([(ours[name].double() - theirs[name]).flatten() for name in theirs])
    return float(difference.detach().norm() / torch.cat([t.flatten() for t in theirs.values()]).norm())


CASES = [(base, norm, n, "clean") for base in BASES for norm in ("tensor", "global") for n in (1, 3)]
CASES += [("nesterov", "tensor", n, "all") for n in (1, 3)]


@pytest.mark.parametrize(("base", "norm", "inner_iter", "batch_norm"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_trajectory_is_the_references(
    base: str, norm: Any, inner_iter: int, batch_norm: Any, dtype: torch.dtype, tolerance: float
) -> None:
    steps = reference(dtype, base, norm, inner_iter, batch_norm)
    model, batches = problem(dtype)
    model = copy.deepcopy(model).to(dtype)
    optimizer = AMP(
        model.parameters(),
        lr=0.005,
        epsilon=0.05,
        inner_lr=0.5,
        inner_iter=inner_iter,
        norm=norm,
        **BASES[base],
    )
    passes = ExtraPasses(model, batch_norm=batch_norm)
    clipped = []
    for (images, labels), step in zip(batches, steps, strict=True):
        _, loss = optimizer.step(closure_for(optimizer, model, (images.to(dtype), labels)), passes=passes)
        assert relative_difference(dict(model.named_parameters()), step.params) < tolerance
        statistics = {k: v for k, v in step.buffers.items() if v.is_floating_point()}
        assert relative_difference(dict(model.named_buffers()), statistics) < tolerance
        if inner_iter == 1:
            assert loss.item() == pytest.approx(step.loss, rel=100 * tolerance)
        norm_of_delta = sum(n**2 for n in step.delta_norms.values()) ** 0.5
        assert optimizer.statistics()["perturbation_norm"].item() == pytest.approx(norm_of_delta, rel=100 * tolerance)
        clipped.append(optimizer.statistics()["clipped"].item())
    assert max(clipped) > 0.0, "the ball must have been reached, or projection was not tested"
    if norm == "tensor":
        assert min(clipped) < 1.0, "and some tensors must have stayed inside"
