"""Small trainings on a CUDA device through AMP's doors, and how far they end from a float64 AMP on the CPU.

The tests with the mark `cuda` are made of these. `AMP_PLUGIN_TEST_DEVICE=cpu` runs them on the CPU instead, where a
captured step is made as it is: a trial of the tests themselves, on a machine without a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from exactness_problem import BALL, SIZE, STEPS, Batch, Net
from exactness_problem import SGD as SGD_OF_TABLE
from problems import small_batches
from reference import Step as ReferenceStep
from reference import amp_trajectory
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, CapturedStep, ExtraPasses, attach
from amp_plugin.core.grad_scaler import scale_of

DEVICE = torch.device(os.environ.get("AMP_PLUGIN_TEST_DEVICE", "cuda"))
MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
SGD: dict[str, Any] = {**SGD_OF_TABLE, "lr": 2.0**-4}  # the same in float32, of which a captured learning rate is
Step = Callable[[], Tensor]


class Precision(NamedTuple):
    """What a training computes in.

    Attributes:
        bound: largest distance to the reference, in parts of the way that the weights went.
        autocast: type of the passes, where it is another one than that of the weights.
        dtype: type of the weights.
    """

    bound: float
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float32


PRECISIONS = {
    "fp64": Precision(1e-8, dtype=torch.float64),
    "fp32": Precision(1e-3),
    "tf32": Precision(2e-2),
    "bf16": Precision(6e-2, torch.bfloat16),
    "fp16": Precision(2e-2, torch.float16),
}


def batches(first: int = 0) -> list[Batch]:
    """A batch for each step, from one of them on and around."""
    every = small_batches(STEPS, SIZE, torch.float64)
    return [*every[first:], *every[:first]]


@functools.cache
def reference(first: int = 0) -> list[ReferenceStep]:
    """The steps of the float64 AMP on the CPU."""
    return amp_trajectory(Net().body, F.cross_entropy, batches(first), **BALL, **SGD)


def distance(net: nn.Module, first: int = 0) -> float:
    """How far weights and running statistics (the larger one) ended from the reference, in parts of their ways."""
    start, end, found = Net().body.state_dict(), reference(first)[-1], net.state_dict()
    distances = []
    for expected in (end.params, {name: b for name, b in end.buffers.items() if b.is_floating_point()}):
        ends = [found[f"body.{name}"].detach().double().cpu() for name in expected]
        off, way = (
            sum(float((a - expected[name]).square().sum()) for name, a in zip(expected, some, strict=True))
            for some in (ends, [start[name].double() for name in expected])
        )
        distances.append((off / way) ** 0.5)
    return max(distances)


def assert_ends_as_the_reference(training: Training, losses: list[float], first: int = 0) -> None:
    bound = training.precision.bound
    assert distance(training.net, first) < bound
    assert losses == pytest.approx([step.loss for step in reference(first)], rel=bound)


class Training:
    """A net with its optimizer, and a batch in place.

    Args:
        precision: name of one of the `PRECISIONS`.
        captured: whether the optimizer lets a CUDA graph hold its step.
        compiled: mode of `torch.compile` for the net; default None, not compiled.
        net: the net; default that of the reference.
        perturbed: whether there is a ball at all; default True.
        options: further arguments of `ExtraPasses`.
    """

    def __init__(
        self,
        precision: str,
        *,
        captured: bool = False,
        compiled: str | None = None,
        net: nn.Module | None = None,
        perturbed: bool = True,
        **options: Any,
    ) -> None:
        allow_tf32(precision == "tf32")
        self.precision, self.captured = PRECISIONS[precision], captured
        dtype = self.precision.dtype
        self.net = (Net() if net is None else net).to(DEVICE, dtype)
        self.model: Any = self.net if compiled is None else torch.compile(self.net, dynamic=False, mode=compiled)
        self.images = torch.zeros(SIZE, 3, 8, 8, dtype=dtype, device=DEVICE)
        self.labels = torch.zeros(SIZE, dtype=torch.int64, device=DEVICE)
        settings: dict[str, Any] = {**SGD, **BALL, "fused": captured, "capturable": captured}
        if captured:
            settings["lr"] = torch.tensor(SGD["lr"], device=DEVICE)
        if not perturbed:
            settings["epsilon"] = 0.0
        self.optimizer = AMP(self.net.parameters(), **settings)
        self.options = options
        self.passes = ExtraPasses(self.model, **options)
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10) if precision == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.precision)

    def load(self, images: Tensor, labels: Tensor) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)

    def loss(self) -> Tensor:
        with self.autocast():
            loss: Tensor = self.model(self.images, self.labels)["loss"]
        return loss

    def backward(self) -> Tensor:
        """The loss, detached."""
        loss = self.loss()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def descend(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def run(self, step: Step, first: int = 0, *, warm_up: int = 2) -> list[float]:
        """The loss before each step."""
        if self.captured:
            step = CapturedStep(step, self.optimizer, warm_up=warm_up)
        losses = []
        for batch in batches(first):
            self.load(*batch)
            losses.append(step().clone())
        return [loss.item() for loss in losses]

    def held(self) -> list[Tensor]:
        """The weights and their momentum."""
        state = self.optimizer.state
        params = list(self.net.parameters())
        return [*params, *(b for p in params if (b := state[p].get("momentum_buffer")) is not None)]


def by_closure(training: Training) -> Step:
    optimizer = training.optimizer

    def closure() -> Tensor:
        optimizer.zero_grad()
        return training.backward()

    return lambda: optimizer.step(closure, passes=training.passes)  # type: ignore[no-any-return]


def by_ascend(training: Training) -> Step:
    optimizer, passes = training.optimizer, training.passes

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = []
        for k in range(optimizer.inner_iter):
            with passes.nth(k):
                losses.append(training.backward().clone())
            optimizer.ascend(grad_scale=scale_of(training.scaler))
        with passes.nth(optimizer.inner_iter):
            training.backward()
        if training.scaler is not None:
            optimizer.propagate_overflow()
        training.descend()
        return losses[0]

    return step


def by_ascent_passes(training: Training) -> Step:
    optimizer, passes = training.optimizer, training.passes

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = []
        for _ in optimizer.ascent_passes(grad_scale=scale_of(training.scaler), passes=passes):
            losses.append(training.backward().clone())
        with passes.nth(len(losses)):
            training.backward()
        if training.scaler is not None:
            optimizer.propagate_overflow()
        training.descend()
        return losses[0]

    return step


def by_attach(training: Training) -> Step:
    attach(training.optimizer, training.model, **training.options)

    def step() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.backward()
        training.descend()
        return loss

    return step


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, precision.autocast, enabled=precision.autocast is not None)


@contextmanager
def own_settings() -> Iterator[None]:
    """What a training sets for the whole process is put back: TF32, environment variables, compiled code."""
    environment, backends = dict(os.environ), torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.fp32_precision
    try:
        yield
    finally:
        backends.fp32_precision = before[2]
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before[:2]
        os.environ.clear()
        os.environ.update(environment)
        torch._dynamo.reset()


def assert_a_nan_changes_nothing(training: Training, step: Step, captured: bool) -> None:
    if captured:
        step = CapturedStep(step, training.optimizer, warm_up=1)
    good, bad = batches()[:2]
    bad[0][3, 1, 2, 2] = torch.nan
    for batch, moves in [(good, True)] * 3 + [(bad, False)] * 2 + [(good, True)]:
        before = [tensor.detach().clone() for tensor in training.held()]
        training.load(*batch)
        step()
        same = [torch.equal(a, b) for a, b in zip(before, training.held(), strict=False)]  # momentum begins with a step
        assert same == [not moves] * len(same)
    assert training.optimizer.skipped_steps == 2


def assert_overflows_lower_the_scale(training: Training, step: Step, captured: bool) -> None:
    """Where the training's scaler starts at 2 ** 40."""
    if captured:
        step = CapturedStep(step, training.optimizer, warm_up=1)
    training.load(*batches()[0])
    before = [p.detach().clone() for p in training.net.parameters()]
    for k in range(1, 5):
        step()
        assert training.scaler is not None
        assert training.scaler.get_scale() == 2.0 ** (40 - k)
    assert all(torch.equal(a, b) for a, b in zip(before, training.net.parameters(), strict=True))
