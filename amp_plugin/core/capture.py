"""Whole training steps as CUDA graphs, which are launched at once, without Python between the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Generic

import torch
from torch import Tensor
from torch.optim import Optimizer

from amp_plugin.core.captured_call import CapturedCall, Result, can_capture
from amp_plugin.core.distributed import in_process_group
from amp_plugin.core.find import find_amp
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.sharding import local_shard
from amp_plugin.core.step import Step
from amp_plugin.core.warn import warn_user


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
    """

    def __init__(self, step: Callable[[], Result], optimizer: Optimizer, *, warm_up: int | None = None) -> None:
        self._amp = find_amp(optimizer)
        if self._amp is not None and not self._amp.capturable:
            raise ValueError("CapturedStep needs AMP(..., fused=True, capturable=True): else the host has a say")
        if warm_up is None:
            warm_up = calls_to_warm_up()
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {warm_up}")
        self._optimizer = optimizer
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        device: torch.device = self._params[0].device
        if can_capture(device) and not all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
            warn_user(
                "CapturedStep repeats the learning rate of its capture, because that is a number; a schedule needs"
                " lr=torch.tensor(0.1, device=...)"
            )
        self._make = partial(
            CapturedCall,
            step,
            device,
            "CapturedStep: this step",
            warm_up=warm_up,
            prepare=self._clear_gradients,
            forget=self._forget,
        )
        self._call: CapturedCall[Result] = self._make()
        self._places, self._state = places_of(self._params), optimizer.state

    def __call__(self) -> Result:
        """Make one step; a step whose parameters or state have moved is captured anew.

        Returns:
            What the step returns; under CUDA always the same tensors, with new values.
        """
        places, state = places_of(self._params), self._optimizer.state
        if places != self._places or state is not self._state:
            self._call, self._places, self._state = self._make(), places, state
        return self._call()

    def _clear_gradients(self) -> None:
        """Let the backward pass make the gradients anew, in the graph's own memory."""
        for p in self._params:
            p.grad = None

    def _forget(self) -> None:
        self._clear_gradients()
        if self._amp is not None:
            forget_step(self._amp)


def places_of(params: Iterable[Tensor]) -> list[tuple[int, bool]]:
    """Return where parameters are, and which are trained: a graph goes on with what they were at its capture."""
    return [(local_shard(p).data_ptr(), p.requires_grad) for p in params]


def calls_to_warm_up() -> int:
    """Return how many calls of a pass come before its capture; DistributedDataParallel takes 11 to settle."""
    return 11 if in_process_group() else 3


def forget_step(amp: AMP) -> None:
    """Forget a step that was only recorded: its kernels have not run, so there is nothing to put back."""
    amp.perturbation.forget()
    amp.progress = Step()
