"""A Trainer's step as three CUDA graphs: the passes over a window, the clipping, and the optimizer's step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

from amp_plugin.core.capture import calls_to_warm_up, forget_step, places_of
from amp_plugin.core.captured_call import CapturedCall
from amp_plugin.core.inputs import map_tensors
from amp_plugin.core.optimizer import AMP
from amp_plugin.doors.training_args import AMPArguments

logger = logging.get_logger(__name__)

MOST_KINDS = 4  # of windows that are captured; each kind takes the memory of its passes
_CONSTANTS = (bool, int, float, str, type(None))


class Passes(NamedTuple):
    """What the passes over a window have found.

    Attributes:
        losses: what `training_step` returns to the loop, one for each micro-batch.
        measures: what the step adds to the means of the log, by name.
    """

    losses: list[Tensor]
    measures: dict[str, Tensor | float]


class CapturedTraining:
    """The captured steps of a training: one kind for every shape of a window and every set of hyper-parameters.

    A kind is captured after some steps as they are. The passes, from the first ascent to the way back to theta, run for
    the whole window at its first micro-batch. A window that cannot be captured is told once, and trained as it is.

    The learning rate may change from step to step: a copy on the device follows it. What else Python does in a step,
    and every other hyper-parameter, is the kind's.

    Args:
        model: module that is trained, as the loop calls it.
        optimizer: optimizer that the loop's wrapper steps; its ``step`` is replaced until :meth:`close`.
        amp: the AMP optimizer in it; None in a training without AMP.
        device: device of the parameters, where the batches go.

    Raises:
        ValueError: The host has a say in the optimizer's step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, amp: AMP | None, device: torch.device) -> None:
        check_optimizer(optimizer, amp)
        self.model, self._optimizer, self._amp, self._device = model, optimizer, amp, device
        self._params = list(model.parameters())
        self._rates = _DeviceRates(optimizer, device)
        self._kinds: list[_Kind] = []
        self._replayed: _Kind | None = None  # whose graph has made the gradients that are there now
        self._told = False
        self._own_step = optimizer.step
        vars(optimizer)["step"] = self._step

    def close(self) -> None:
        """Give the optimizer its own ``step`` back."""
        vars(self._optimizer).pop("step", None)

    def passes(self, run: Callable[[Sequence[Any], Any], Passes], batches: Sequence[Any], num_items: Any) -> Passes:
        """Make the passes over a window, or replay them; the gradients of the descent are there afterwards.

        Args:
            run: function of the micro-batches and of the number of items in them that makes the passes.
            batches: micro-batches of the step.
            num_items: number of items in them, or None.
        """
        self._replayed = None
        kind = self._kind_of(batches, num_items)
        if kind is None:
            return run(batches, num_items)
        kind.fill(batches, num_items)
        if kind.passes is None:
            kind.passes = CapturedCall(
                lambda: self._noted(kind, run(kind.batches, kind.num_items)),
                self._device,
                "amp_capture: the passes of this training",
                warm_up=calls_to_warm_up(),
                forget=self._forget,
            )
        made = kind.passes()
        if kind.passes.captured:
            self._resume(kind)
        else:
            kind.gradients = []  # which would be kept until the next step
        return made

    def clip(self, clip: Callable[[], Any]) -> Any:
        """Clip the gradients, or replay that, and return their norm."""
        kind = self._replayed
        if kind is None or not self._holds_gradients_of(kind):
            return clip()
        if kind.clip is None:
            kind.clip = CapturedCall(clip, self._device, "amp_capture: the clipping of this training")
        return kind.clip()

    def _step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        kind, self._replayed = self._replayed, None
        self._rates.follow()
        if kind is None or closure is not None or kwargs or not self._holds_gradients_of(kind):
            with self._rates.lent():
                return self._own_step(closure, **kwargs) if closure or kwargs else self._own_step()
        if kind.step is None:
            kind.step = CapturedCall(
                self._step_at_device_rates,
                self._device,
                "amp_capture: the optimizer's step",
                forget=self._put_progress_of(kind),
            )
        replays = kind.step.captured
        result = kind.step()
        if replays and self._amp is not None:
            self._amp.end_step()
        return result

    def _step_at_device_rates(self) -> Any:
        with self._rates.lent():
            return self._own_step()

    def _kind_of(self, batches: Sequence[Any], num_items: Any) -> _Kind | None:
        """Return the kind of a window; None if it cannot be captured."""
        if any(p.grad is not None for p in self._params):
            self._tell("a gradient from before the step is there, to which the passes add theirs")
            return None
        ball = None if self._amp is None else (self._amp.inner_iter, self._amp.norm)
        try:
            outline = (
                map_tensors(_outline, (list(batches), num_items)),
                _options(self._optimizer),
                ball,
                places_of(self._params),
            )
        except TypeError as error:
            self._tell(f"{error}")
            return None
        for kind in self._kinds:
            if kind.outline == outline and kind.state is self._optimizer.state:
                return kind
        if len(self._kinds) == MOST_KINDS:
            self._tell(
                f"batches of more than {MOST_KINDS} shapes, or hyper-parameters that change beside the learning rate,"
                " or parameters that are frozen or replaced on the way; pad the batches to one length"
                " (padding='max_length')"
            )
            return None
        self._kinds.append(_Kind(outline, self._optimizer.state, batches, num_items, self._device))
        return self._kinds[-1]

    def _tell(self, reason: str) -> None:
        if not self._told:
            logger.warning(f"amp_capture: some steps are made as they are, without a capture: {reason}")
            self._told = True

    def _noted(self, kind: _Kind, made: Passes) -> Passes:
        """Note where Python is after the passes."""
        kind.gradients = [p.grad for p in self._params]
        if self._amp is not None:
            kind.progress, kind.outcome = self._amp.progress, self._amp.perturbation.outcome
        return made

    def _resume(self, kind: _Kind) -> None:
        """Let Python be where it was after the passes that were captured."""
        self._replayed = kind
        for p, gradient in zip(self._params, kind.gradients, strict=True):
            p.grad = gradient
        self._put_progress_of(kind)()
        if not self.model.training:
            self.model.train()

    def _put_progress_of(self, kind: _Kind) -> Callable[[], None]:
        def put() -> None:
            if self._amp is not None:
                self._amp.progress, self._amp.perturbation.outcome = copy.copy(kind.progress), kind.outcome

        return put

    def _forget(self) -> None:
        for p in self._params:
            p.grad = None
        if self._amp is not None:
            forget_step(self._amp)

    def _holds_gradients_of(self, kind: _Kind) -> bool:
        return all(p.grad is gradient for p, gradient in zip(self._params, kind.gradients, strict=True))


class _Kind:
    """Windows that are captured alike, with the tensors that the graphs read.

    Attributes:
        outline: shapes and constants of the window, the hyper-parameters, and where the parameters are.
        state: the optimizer's, which a load replaces.
        gradients: gradients that the captured passes write, one for each parameter of the model.
        progress: the AMP step after the passes.
        outcome: what the ball has found in them.
    """

    def __init__(self, outline: Any, state: Any, batches: Sequence[Any], num_items: Any, device: torch.device) -> None:
        self.outline, self.state = outline, state
        self._static: list[Tensor] = []

        def static(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            self._static.append(torch.empty_like(leaf, device=device))
            return self._static[-1]

        self.batches, self.num_items = map_tensors(static, (list(batches), num_items))
        self.gradients: list[Tensor | None] = []
        self.progress: Any = None
        self.outcome: Any = None
        self.passes: CapturedCall[Passes] | None = None
        self.clip: CapturedCall[Any] | None = None
        self.step: CapturedCall[Any] | None = None

    def fill(self, batches: Sequence[Any], num_items: Any) -> None:
        """Copy a window to where the graphs read it."""
        leaves: list[Tensor] = []
        map_tensors(lambda leaf: leaves.append(leaf) if isinstance(leaf, Tensor) else None, (list(batches), num_items))
        with torch.no_grad():
            for place, leaf in zip(self._static, leaves, strict=True):
                place.copy_(leaf, non_blocking=True)


class _DeviceRates:
    """Learning rates on the device, which follow the numbers in the groups of an optimizer."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer  # which replaces its groups when it loads a state
        precision = torch.float32 if device.type == "cuda" else torch.float64  # CUDA's fused kernels read the former
        self._rates = [torch.zeros((), dtype=precision, device=device) for _ in optimizer.param_groups]
        self._values: list[Any] = [None] * len(self._rates)

    def follow(self) -> None:
        """Write the rates that have changed to the device."""
        for i, group in enumerate(self._optimizer.param_groups):
            if self._values[i] != group["lr"] and not isinstance(group["lr"], Tensor):
                self._values[i] = group["lr"]
                self._rates[i].fill_(group["lr"])

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the groups have the rates on the device for a while."""
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate, number in zip(groups, self._rates, numbers, strict=True):
            group["lr"] = number if isinstance(number, Tensor) else rate
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number


def _outline(leaf: Any) -> Any:
    """Return what a graph depends on of a leaf of the batch."""
    if isinstance(leaf, Tensor) and not leaf.requires_grad:
        return tuple(leaf.shape), leaf.dtype
    if isinstance(leaf, _CONSTANTS):
        return leaf
    raise TypeError(f"a batch holds a {type(leaf).__name__}, where only tensors of fixed shapes can be captured")


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of the groups but the learning rate, as far as they are constants."""
    return [
        {name: value for name, value in group.items() if name != "lr" and isinstance(value, (*_CONSTANTS, tuple))}
        for group in optimizer.param_groups
    ]


def check_optimizer(optimizer: Optimizer, amp: AMP | None) -> None:
    """Raise ValueError if the host has a say in the steps of an optimizer, which a replay would not ask."""
    if not all(group.get("fused") for group in optimizer.param_groups) or not (amp is None or amp.capturable):
        raise ValueError(
            "amp_capture needs an optimizer made with fused=True, and AMP with capturable=True too: else the host has"
            " a say; let the Trainer make the optimizer, or leave amp_capture out"
        )


def fused_options(optimizer: Any, args: Any) -> dict[str, Any]:
    """Return what an optimizer needs for a step that is captured."""
    if not isinstance(args, AMPArguments) or not args.captures:
        return {}
    options = inspect.signature(optimizer).parameters
    if "fused" not in options:
        raise ValueError(
            f"--optim {args.optim}: amp_capture needs an optimizer with fused kernels, of torch's SGD, Adam, AdamW and"
            f" Adagrad; leave amp_capture out for {getattr(optimizer, '__name__', optimizer)}"
        )
    return {"fused": True} | ({"capturable": True} if "capturable" in options else {})
