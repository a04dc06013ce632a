"""The ascent over a window of micro-batches, which every door that sees the batch goes through."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from amp_plugin.core.distributed import average_gradients, data_parallel, share_overflow
from amp_plugin.core.gathered import gather_anew
from amp_plugin.core.inputs import BatchWatch
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.other_gradients import GradientsAside
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.core.sharding import is_distributed


def ascend_over(
    amp: AMP,
    passes: ExtraPasses,
    model: nn.Module,
    window: Sequence[Any],
    grad_scale: float | Tensor = 1.0,
    *,
    sync: bool = True,
    within_forward: bool = False,
    culprit: str = "the model changes its batch",
) -> Generator[tuple[Sequence[Any], bool], None, None]:
    """Yield the micro-batches of each ascent pass; after each pass let the processes agree, then move the weights.

    The caller runs all of them forward and backward, so that the gradients add up to that of their mean loss, and holds
    the generator in `contextlib.closing`: only then does it clean up after an exception in a pass.

    Args:
        amp: optimizer whose weights move.
        passes: guard of the module's state and random numbers; the caller runs the pass of the descent under it too.
        model: module that is trained, perhaps with DDP around it.
        window: micro-batches of one step.
        grad_scale: factor that the loss is multiplied by; default 1.
        sync: whether the ascent's gradient is averaged over processes, so that any number of them equals one; if not,
            each process perturbs along its own gradient. Default True.
        within_forward: whether the passes run inside the forward pass that the loop has called, where DDP cannot
            average; default False.
        culprit: begin of the error about a batch that a pass has changed; default "the model changes its batch".

    Yields:
        The micro-batches of the pass; and whether DDP is to average gradients in the backward pass of the last one.

    Raises:
        RuntimeError: a pass has changed the batch in place.
        ValueError: the ascent is not averaged, but no process has a whole parameter.
    """
    if not sync and any(map(is_distributed, _perturbed(amp))):
        raise ValueError(
            "each process holds a part of every parameter (FSDP), so it cannot perturb them along its own gradient;"
            " leave sync_ascent on, or use DDP"
        )
    gather_anew(model)  # an evaluation may have left gathered weights, which are none of the optimizer's
    ddp = data_parallel(model)
    # DDP cannot average within a forward pass, and waits for gradients that a restricted ball switches off: in both
    # cases they are averaged here, after the pass.
    by_hand = within_forward or amp.selection.prunes(amp.param_groups)
    watch = BatchWatch(window)
    before = GradientsAside(p for group in amp.param_groups for p in group["params"])
    try:
        for part in amp.passes_of_step(window, grad_scale, passes=passes):
            gather_anew(model)  # for the weights have moved, and a loop may let FSDP keep them after a backward pass
            with ddp.no_sync() if within_forward and ddp is not None else nullcontext():
                yield part, sync and not by_hand
            watch.check(culprit)
            if sync and by_hand and ddp is not None:
                average_gradients(_perturbed(amp), ddp.process_group)
            # An attached module without DDP belongs to this process alone, and must not wait for the others.
            elif not sync and (ddp is not None or not within_forward):
                share_overflow(_perturbed(amp), None if ddp is None else ddp.process_group)
        gather_anew(model)  # at theta + delta
    finally:
        before.put_back()  # for the descent


def note_idle(amp: AMP) -> None:
    """Note, after all passes of a step, if none has left a gradient: ``step()`` does nothing then, which is right."""
    amp.progress.idle = not amp.has_gradients()


def _perturbed(amp: AMP) -> list[Tensor]:
    """Return the parameters that the ascent moves; the gradients of all others count in the descent alone."""
    return [p for p in amp.selection.within(amp.param_groups) if p.requires_grad]
