"""The accumulation window of a Trainer, and what lets the Trainer's own methods take part in every pass over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from amp_plugin.core.gathered import is_fully_sharded

if TYPE_CHECKING:
    from amp_plugin.doors.trainer import AMPMixin

TrainingStep = Callable[[nn.Module, Any, Any], Tensor]


@dataclass
class Window:
    """The accumulation window under way."""

    batches: Sequence[Any] = ()
    rest: Sequence[Any] = ()  # micro-batches that the descent runs, in the last calls of the loop
    calls: int = 0  # how often the loop has called a step of this window
    clean_losses: list[Tensor] = field(default_factory=list)  # one for each micro-batch
    amp_losses: list[Tensor] = field(default_factory=list)  # one for each micro-batch that the descent has run
    descent: ExitStack | None = None  # closing it leads back to theta
    prepared: dict[int, Any] = field(default_factory=dict)  # by identity of the micro-batch
    current: int = 0  # identity of the micro-batch whose step is being made
    counts: bool = True  # whether the Trainer counts tokens and the like in the pass under way
    prepares: bool = False  # whether the Trainer is preparing a micro-batch
    in_step: bool = False  # whether a pass is under way, in which the Trainer's steps are its own
    returned: list[Tensor] = field(default_factory=list)  # losses that the loop has not asked for yet, if captured


def step_in_every_pass(training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let the passes of a step be made around this override, unless it is called from another one."""

    @functools.wraps(training_step)
    def in_every_pass(self: AMPMixin, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return self._amp_step_of_loop(functools.partial(training_step, self), model, inputs, num_items_in_batch)

    return in_every_pass


def prepared_once(prepare_inputs: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let this override prepare a micro-batch once for all passes."""

    @functools.wraps(prepare_inputs)
    def once(self: AMPMixin, inputs: Any) -> Any:
        return self._amp_prepared(functools.partial(prepare_inputs, self), inputs)

    return once


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool, before: bool) -> Iterator[None]:
    """Let the backward pass of DDP or FSDP average gradients over processes, or not, whatever the loop has set.

    Args:
        model: module that the Trainer trains.
        enabled: whether gradients are averaged in here.
        before: whether the loop lets FSDP average them, which FSDP itself does not tell.
    """
    model = getattr(model, "_orig_mod", model)  # accelerate compiles around DDP
    if isinstance(model, DistributedDataParallel):
        before, model.require_backward_grad_sync = model.require_backward_grad_sync, enabled
        try:
            yield
        finally:
            model.require_backward_grad_sync = before
    elif is_fully_sharded(model):
        sharded: Any = model
        sharded.set_requires_gradient_sync(enabled)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(before)
    else:
        yield


@contextmanager
def backward_observed(accelerator: Accelerator, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Let a function see every loss before accelerate makes its backward pass."""
    backward, own = accelerator.backward, vars(accelerator).get("backward")  # the user may have set one

    @functools.wraps(backward)
    def observed(loss: Tensor, **kwargs: Any) -> None:
        observe(loss)
        backward(loss, **kwargs)

    accelerator.backward = observed
    try:
        yield
    finally:
        del accelerator.backward
        if own is not None:
            vars(accelerator)["backward"] = own


class EndOfEpoch(TrainerCallback):
    """Ends a window that a stop has cut short, so that the save which follows finds the unperturbed weights."""

    def __init__(self, trainer: AMPMixin) -> None:
        self._trainer = trainer

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the window."""
        self._trainer._end_amp_window()
