"""Whole training steps as CUDA graphs, which are launched at once, without Python between the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.distributed import in_process_group
from amp_plugin.core.find import find_amp
from amp_plugin.core.step import Step
from amp_plugin.core.warn import warn_user

Result = TypeVar("Result")


class CapturedStep(Generic[Result]):
    """A training step that CUDA replays as one graph from its fourth call on; other devices make the step as it is.

    Small networks keep a GPU waiting for Python; AMP's step has twice the passes to wait for. The step must always use
    the same tensors: copy each batch into them. Every call is a step of the training, the first ones too::

        optimizer = AMP(model.parameters(), lr=torch.tensor(0.1).cuda(), fused=True, capturable=True)
        step = CapturedStep(lambda: optimizer.step(closure), optimizer)
        for x, y in loader:
            images.copy_(x), labels.copy_(y)
            loss = step()

    What Python does in a step is frozen with it: `epsilon`, `inner_lr`, random numbers that the host draws, and a
    learning rate that is no tensor. A step that CUDA cannot capture is told, and made as it is from then on. Several
    captured steps may be replayed side by side, each on the stream that is current when it is called.

    Args:
        step: function that makes one step and returns tensors, which the next call overwrites.
        optimizer: optimizer of the step, so that what cannot be captured is refused now.
        warm_up: number of calls before the capture, at least 1; default 3, and 11 in a process group, where
            DistributedDataParallel takes as many to settle. What is made once (momentum, cuDNN's choice of kernels) is
            made there.

    Raises:
        ValueError: AMP is not ``capturable``, or there is no warm-up.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, step: Callable[[], Result], optimizer: Optimizer, *, warm_up: int | None = None) -> None:
        self._amp = find_amp(optimizer)
        if self._amp is not None and not self._amp.capturable:
            raise ValueError("CapturedStep needs AMP(..., fused=True, capturable=True): else the host has a say")
        if warm_up is None:
            warm_up = 11 if in_process_group() else 3
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {warm_up}")
        self._step, self._warm_up = step, warm_up
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._record = RECORDERS.get(self._params[0].device.type)
        self._replay: Callable[[], Any] | None = None
        self._result: Any = None
        self._stream: torch.cuda.Stream | None = None
        if self._record and not all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
            warn_user(
                "CapturedStep repeats the learning rate of its capture, because that is a number; a schedule needs"
                " lr=torch.tensor(0.1, device=...)"
            )

    def __call__(self) -> Result:
        """Make one step.

        Returns:
            What the step returns; under CUDA always the same tensors, with new values.
        """
        if self._record is None:
            return self._step()
        if self._warm_up:
            self._warm_up -= 1
            return self._beside()
        if self._replay is None and not self._capture(self._record):
            return self._step()
        assert self._replay is not None
        self._replay()
        result: Result = self._result
        return result

    def _beside(self) -> Result:
        """Make the step on the stream of the capture, as CUDA wants it before."""
        if not torch.cuda.is_available():
            return self._step()
        if self._stream is None:  # one for each captured step: graphs of one stream share, and fight for, its workspace
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, record: Recorder) -> bool:
        """Capture the step without making it; return False, with a warning, if that cannot be done."""
        for p in self._params:
            p.grad = None  # the backward pass makes them anew, in the graph's own memory
        try:
            self._replay, self._result = record(self._step, self._stream)
        except Exception as error:
            self._record = None
            self._forget()
            lines = str(error).strip().splitlines() or [""]
            warn_user(
                f"CapturedStep: this step cannot be captured, and is made as it is from now on. {type(error).__name__}:"
                f" {lines[0]}"
            )
            return False
        return True

    def _forget(self) -> None:
        """Forget a step that was only recorded: its kernels have not run, so there is nothing to put back."""
        for p in self._params:
            p.grad = None
        if self._amp is not None:
            self._amp.perturbation.forget()
            self._amp.progress = Step()


def _cuda_graph(step: Callable[[], Any], stream: torch.cuda.Stream | None) -> tuple[Callable[[], Any], Any]:
    """Capture a step without making it; return a function that makes it, and what the step returned."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (a loader that pins memory) may go on with what a capture forbids.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result


# The function that captures a step, by type of device. It is given a stream to capture on.
Recorder = Callable[[Callable[[], Any], Any], tuple[Callable[[], Any], Any]]
RECORDERS: dict[str, Recorder] = {"cuda": _cuda_graph}
