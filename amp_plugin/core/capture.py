"""Whole training steps as CUDA graphs, which are launched at once, without Python between the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.optim import Optimizer

from amp_plugin.core.find import find_amp

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

    What Python does in a step is frozen with it: `epsilon`, `inner_lr` and a learning rate that is no tensor.

    Args:
        step: function that makes one step and returns tensors, which the next call overwrites.
        optimizer: optimizer of the step, so that what cannot be captured is refused now.
        warm_up: number of calls before the capture, at least 1, default 3; what is made once (momentum, cuDNN's choice
            of kernels) is made there.

    Raises:
        ValueError: AMP is not ``capturable``, or there is no warm-up.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, step: Callable[[], Result], optimizer: Optimizer, *, warm_up: int = 3) -> None:
        amp = find_amp(optimizer)
        if amp is not None and not amp.capturable:
            raise ValueError("CapturedStep needs AMP(..., fused=True, capturable=True): else the host has a say")
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {warm_up}")
        self._step, self._warm_up = step, warm_up
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._replay: Callable[[], Any] | None = None
        self._result: Any = None

    def __call__(self) -> Result:
        """Make one step.

        Returns:
            What the step returns; under CUDA always the same tensors, with new values.
        """
        record = RECORDERS.get(self._params[0].device.type)
        if record is None:
            return self._step()
        if self._warm_up:
            self._warm_up -= 1
            return self._beside()
        if self._replay is None:
            for p in self._params:
                p.grad = None  # the backward pass makes them anew, in the graph's own memory
            self._replay, self._result = record(self._step)
        self._replay()
        result: Result = self._result
        return result

    def _beside(self) -> Result:
        """Make the step on another stream, as CUDA wants it before a capture."""
        if not torch.cuda.is_available():
            return self._step()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return result


def _cuda_graph(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Capture a step without making it; return a function that makes it, and what the step returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


# The function that captures a step, by type of device.
RECORDERS: dict[str, Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]] = {"cuda": _cuda_graph}
