"""The ways to make a training step that are compared on one device.

Nothing but torch, timm and this package is needed. The network and the batch of a problem serve all ways to train.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from amp_plugin import AMP, CapturedStep, ExtraPasses, LossModule, attach

Step = Callable[[], Any]
SGD_ARGS: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
LR, RHO, CLIP_NORM = 0.01, 0.05, 50.0  # of SGD, of SAM, and of the recipe
NETWORKS: dict[str, dict[str, Any]] = {"11.2M": {"width": 64}, "tiny": {"width": 4, "layers": (1, 1, 1, 1)}}
PRECISIONS = ("bf16", "tf32", "fp32")


class Mode(NamedTuple):
    """How a step is made: as one CUDA graph or not, and with a compiled network or not."""

    captured: bool
    compiled: bool


MODES = {
    "eager": Mode(False, False),
    "captured": Mode(True, False),
    "captured, compiled": Mode(True, True),
    "compiled": Mode(False, True),
}


class Problem:
    """A network with a batch that stays in place.

    Args:
        device: where both are.
        network: name of one of the `NETWORKS`.
        batch: number of images.
        precision: ``"bf16"`` (autocast), ``"tf32"`` or ``"fp32"``; the weights are float32.
        mode: name of one of the `MODES`.
    """

    def __init__(self, device: torch.device, network: str, batch: int, precision: str, mode: str) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch.backends.cudnn.benchmark = True
        self.device, self.precision, self.mode = device, precision, MODES[mode]
        torch.manual_seed(0)
        model = timm.create_model("preactresnet18", num_classes=10, **NETWORKS[network])
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        self.net: Any = torch.compile(self.model, dynamic=False) if self.mode.compiled else self.model
        self.images = torch.randn(batch, 3, 32, 32).to(device).to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,)).to(device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast of the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        with self.autocast():
            outputs = self.net(self.images)
        return F.cross_entropy(outputs.float(), self.labels)

    def sgd(self) -> dict[str, Any]:
        """Return SGD's options, with the learning rate where a graph can read it."""
        lr = torch.tensor(LR, device=self.device) if self.mode.captured else LR
        return {"lr": lr, "fused": True, **SGD_ARGS}

    def descend(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, as the recipe does, and let the optimizer step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        optimizer.step()

    def finished(self, step: Step, optimizer: torch.optim.Optimizer) -> Step:
        """Return the step, captured in a captured mode."""
        return CapturedStep(step, optimizer) if self.mode.captured else step


def sgd_step(problem: Problem) -> Step:
    """Return a step of one pass and SGD."""
    optimizer = SGD(problem.model.parameters(), **problem.sgd())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        problem.descend(optimizer)
        return loss.detach()

    return problem.finished(step, optimizer)


def amp(problem: Problem) -> AMP:
    """Return AMP around SGD, with a compiled ball where the step is captured and the network compiled."""
    optimizer = AMP(problem.model.parameters(), capturable=problem.mode.captured, **problem.sgd())
    if problem.mode.captured and problem.mode.compiled:
        optimizer.perturbation.compile()
    return optimizer


def amp_step(problem: Problem) -> Step:
    """Return a step of AMP with two passes of one's own."""
    optimizer = amp(problem)
    passes = ExtraPasses(problem.model, rng="fresh")

    def step() -> Tensor:
        optimizer.zero_grad()
        with passes.clean():
            loss = problem.loss()
            loss.backward()
        optimizer.ascend()
        with passes.perturbed():
            problem.loss().backward()
        optimizer.restore()
        problem.descend(optimizer)
        return loss.detach()

    return problem.finished(step, optimizer)


def attached_step(problem: Problem) -> Step:
    """Return a step of AMP through `attach`, in a plain loop."""
    optimizer = amp(problem)
    module = LossModule(problem.net, lambda outputs, labels: F.cross_entropy(outputs.float(), labels))
    attach(optimizer, module, rng="fresh")

    def step() -> Tensor:
        optimizer.zero_grad()
        with problem.autocast():
            loss: Tensor = module(problem.images, problem.labels)["loss"]
        loss.backward()
        problem.descend(optimizer)
        return loss.detach()

    return problem.finished(step, optimizer)


def sam_step(problem: Problem) -> Step:
    """Return a step of SAM, ``delta = rho * g / |g|``, in as few calls of torch as there can be."""
    optimizer = SGD(problem.model.parameters(), **problem.sgd())
    params: list[Tensor] = list(problem.model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        delta = [p.grad for p in params if p.grad is not None]
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(delta)))
            torch._foreach_mul_(delta, RHO / (norm + 1e-12))
            torch._foreach_add_(params, delta)
        optimizer.zero_grad()
        problem.loss().backward()
        with torch.no_grad():
            torch._foreach_sub_(params, delta)
        problem.descend(optimizer)
        return loss.detach()

    return problem.finished(step, optimizer)


def other_sam_step(problem: Problem) -> Step:
    """Return a step of the SAM of pytorch_optimizer, which no graph can hold; ImportError without that package."""
    if problem.mode.captured:
        raise ValueError("its step asks the host for a value")
    from pytorch_optimizer import SAM

    optimizer = SAM(problem.model.parameters(), base_optimizer=SGD, **problem.sgd())

    def closure() -> Any:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    def step() -> None:
        closure()
        optimizer.step(closure)

    return step


WAYS: dict[str, Callable[[Problem], Step]] = {
    "SGD": sgd_step,
    "AMP": amp_step,
    "AMP, attach": attached_step,
    "SAM": sam_step,
    "SAM of pytorch_optimizer": other_sam_step,
}


def passes_of(way: str) -> int:
    """Return how many forward and backward passes a step takes."""
    return 1 if way == "SGD" else 2


def flops_per_image(network: str) -> float:
    """Return the floating-point operations of a forward and backward pass over one image."""
    problem = Problem(torch.device("cpu"), network, 2, "fp32", "eager")
    with FlopCounterMode(display=False) as counter:
        problem.loss().backward()
    return counter.get_total_flops() / 2
