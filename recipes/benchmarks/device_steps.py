"""Training steps on one device: their ways, what one takes in time and memory, and what the device can do at most.

Nothing but torch, timm and this package is needed. The network and the batch of a problem serve all ways to train.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from amp_plugin import AMP, CapturedStep, ExtraPasses, LossModule, attach

Step = Callable[[], Any]
Row = dict[str, Any]
SGD_ARGS: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
LR, RHO, CLIP_NORM = 0.01, 0.05, 50.0  # of SGD, of SAM, and of the recipe
NETWORKS: dict[str, dict[str, Any]] = {"11.2M": {"width": 64}, "tiny": {"width": 4, "layers": (1, 1, 1, 1)}}
PRECISIONS = ("bf16", "tf32", "fp32")
ROUNDS, GROUP_SECONDS = 5, 0.06


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


def group_size(device: torch.device, step: Step) -> int:
    """Return how many steps make a measurable time, after those that warm up and capture."""
    for _ in range(5):
        step()
    _wait(device)
    begun = time.perf_counter()
    step()
    _wait(device)
    return max(1, int(GROUP_SECONDS / max(time.perf_counter() - begun, 1e-5)))


def milliseconds(device: torch.device, step: Step, group: int) -> tuple[float, float]:
    """Return the milliseconds of a step in a group of steps, and those that the host takes to queue it."""
    _wait(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    if events:
        events[0].record()
    begun = time.perf_counter()
    for _ in range(group):
        step()
    host = 1e3 * (time.perf_counter() - begun) / group
    if not events:
        return host, host
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / group, host


def time_of(device: torch.device, step: Step) -> float:
    """Return the median milliseconds of a step."""
    group = group_size(device, step)
    return median(milliseconds(device, step, group)[0] for _ in range(ROUNDS))


def compare(problem: Problem) -> Iterator[Row]:
    """Yield the times of all ways on a problem, and their ratios to SGD's, from rounds in which they take turns."""
    steps: dict[str, Step] = {}
    groups: dict[str, int] = {}
    for way, make in WAYS.items():
        try:
            step = make(problem)
            groups[way], steps[way] = group_size(problem.device, step), step
        except (ImportError, ValueError) as reason:
            yield {"way": way, "left_out": str(reason)}
        except Exception as error:  # the other ways can still be measured
            traceback.print_exc()
            yield {"way": way, "failed": f"{type(error).__name__}: {error}"[:500]}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            times[way].append(milliseconds(problem.device, step, groups[way]))
    for way, measured in times.items():
        ratios = [ms / base for (ms, _), (base, _) in zip(measured, times["SGD"], strict=True)]
        low, ratio, high = quantiles(ratios, n=4)
        ms, host = (median(column) for column in zip(*measured, strict=True))
        yield {"way": way, "baseline": "SGD", "ratio": ratio, "low": low, "high": high, "ms": ms, "host_ms": host}


def side_by_side(device: torch.device, network: str, count: int) -> Iterator[Row]:
    """Yield the time of several captured AMP steps at once, each on a stream of its own, against one alone; on CUDA."""
    steps = [amp_step(Problem(device, network, 50, "bf16", "captured")) for _ in range(count)]
    streams = [torch.cuda.Stream() for _ in steps]

    def together() -> None:
        current = torch.cuda.current_stream()
        for step, stream in zip(steps, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            current.wait_stream(stream)

    alone, ms = time_of(device, steps[0]), time_of(device, together)
    yield {"runs": count, "baseline": "one run", "ratio": ms / count / alone, "ms": ms, "ms_a_run": ms / count}


def peaks(device: torch.device, network: str, batch: int, mode: str) -> Iterator[Row]:
    """Yield the peak memory of every way with all that lives between steps, and its ratio to SGD's."""
    found: dict[str, int] = {}
    for way in ("SGD", *WAYS):  # the first one makes the workspaces of the libraries, and is measured again
        free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            step = WAYS[way](Problem(device, network, batch, "bf16", mode))
        except (ImportError, ValueError):
            continue
        for _ in range(6):
            step()
        torch.cuda.synchronize()
        found[way] = torch.cuda.max_memory_allocated() - before
        del step
    for way, peak in found.items():
        yield {"way": way, "baseline": "SGD", "ratio": peak / found["SGD"], "mib": peak / 2**20}


def ceilings(device: torch.device) -> Iterator[Row]:
    """Yield what the device can do at most: a large product in each precision, and a copy."""
    for precision, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = True
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        yield {"ceiling": precision, "tflops": 2 * 8192**3 / time_of(device, partial(torch.mm, a, a)) / 1e9}
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield {"ceiling": "copy", "gb_s": 2 * 2**30 / time_of(device, lambda: target.copy_(source)) / 1e6}


def flops_per_image(network: str) -> float:
    """Return the floating-point operations of a forward and backward pass over one image."""
    problem = Problem(torch.device("cpu"), network, 2, "fp32", "eager")
    with FlopCounterMode(display=False) as counter:
        problem.loss().backward()
    return counter.get_total_flops() / 2


def free() -> None:
    """Give back what the last measurement has used, compiled code and memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
