"""AMP in a raw accelerate loop, exact over a whole gradient accumulation window."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from wrapt import when_imported

from amp_plugin.core.find import find_amp
from amp_plugin.core.gathered import forget_pass, gather_anew
from amp_plugin.core.grad_scaler import scale_of
from amp_plugin.core.inputs import detached_inputs
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.replay import BatchNormPolicy, ExtraPasses, RngPolicy
from amp_plugin.doors.fsdp import inexact_settings
from amp_plugin.doors.names import own_names
from amp_plugin.doors.window import ascend_over, note_idle

if TYPE_CHECKING:
    from accelerate import Accelerator

# The guard of an optimizer's passes, kept from call to call for what the first one has found out about the module.
_GUARDS: weakref.WeakKeyDictionary[AMP, ExtraPasses] = weakref.WeakKeyDictionary()
_INEXACT_HOSTS = ("DEEPSPEED", "MEGATRON_LM", "XLA")


def amp_backward(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    compute_loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    *,
    batch_norm: BatchNormPolicy = "clean",
    rng: RngPolicy = "same",
    generators: Sequence[Any] = (),
    sync_ascent: bool = True,
) -> Tensor:
    """Leave AMP's gradient for a window of micro-batches in ``.grad``, in place of ``accelerator.backward(loss)``.

    This is for loops that accumulate gradients; in others :func:`amp_plugin.attach` does the same. One window is one
    update, so ``accelerator.accumulate`` is not needed::

        model, optimizer, loader = accelerator.prepare(model, AMP(model.parameters(), lr=0.1), loader)
        micro_batches = iter(loader)
        while window := list(itertools.islice(micro_batches, 4)):
            loss = amp_backward(accelerator, model, optimizer, lambda batch: model(**batch).loss, window)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    All micro-batches are run at theta, then the weights are perturbed along the mean gradient, then all micro-batches
    are run at theta + delta; the weights are at theta again on return. So k micro-batches equal one that is k times
    larger. Processes average their gradients once in a pass over the window; gradients from before the call are
    dropped. With fp16 an overflow in any pass makes accelerate's gradient scaler skip the step and lower its scale.

    Args:
        accelerator: accelerator of the loop; its ``gradient_accumulation_steps`` does not matter.
        model: module as ``accelerator.prepare`` returned it, not attached.
        optimizer: an :class:`amp_plugin.AMP`, also as ``accelerator.prepare`` returned it.
        compute_loss: function that runs the model on one micro-batch and returns the mean loss, 0-d. It is called
            ``inner_iter + 1`` times for each micro-batch, or less often with an ascent policy; it may take a mapping
            to pieces, but must not change a tensor in place.
        batches: micro-batches of this process, at least one. All count the same, whatever their sizes.
        batch_norm: passes that update running statistics, see :class:`amp_plugin.ExtraPasses`; default ``"clean"``.
        rng: random numbers of the passes, see :class:`amp_plugin.ExtraPasses`; default ``"same"``.
        generators: generators that `compute_loss` draws from besides the global ones, see
            :class:`amp_plugin.ExtraPasses`; default none.
        sync_ascent: whether the processes average the ascent's gradients, so that any number of them equals one; if
            not, each process perturbs along its own gradient. Default True.

    Returns:
        The mean loss of this process's micro-batches at theta, 0-d, detached. With a policy that ascends on a part of
        the window the loss is that of the part; with one that makes no pass at theta, the loss at theta + delta.

    Raises:
        TypeError: the optimizer is not AMP, or a generator is of an unknown kind.
        ValueError: there are no micro-batches, or the host cannot run AMP exactly.
        RuntimeError: the call is within ``accelerator.accumulate``, before its last micro-batch; the optimizer is
            attached; or a batch was changed. Whatever is raised, the weights are at theta.
    """
    amp = find_amp(optimizer)
    if amp is None:
        raise TypeError(f"amp_backward() needs amp_plugin.AMP, got {type(optimizer).__name__}")
    _check(accelerator, amp, batches)
    gather_anew(model)  # for the names are of the parameters, not of what an evaluation has gathered
    amp.name_parameters(own_names(model))
    passes = _guard(amp, model, batch_norm, rng, list(generators))

    def run(window: Sequence[Any], sync: bool = True) -> Tensor:
        # accelerator.backward() divides by gradient_accumulation_steps, but the mean is over this window.
        share = accelerator.gradient_accumulation_steps / len(window)
        losses = []
        for k, batch in enumerate(window, 1):
            with nullcontext() if sync and k == len(window) else accelerator.no_sync(model):
                loss = compute_loss(batch)
                passes.spare_leaves(loss)
                accelerator.backward(loss * share)
            losses.append(loss.detach().clone())  # a compiled module may reuse the memory in its next pass
        return torch.stack(losses).mean()

    def clear() -> None:
        model.zero_grad()
        amp.zero_grad()

    scale = scale_of(accelerator.scaler)
    means: list[Tensor] = []
    clear()
    try:
        culprit = "compute_loss changes its batch"
        with closing(ascend_over(amp, passes, model, batches, scale, sync=sync_ascent, culprit=culprit)) as ascent:
            for part, sync in ascent:
                means.append(run(detached_inputs(part), sync))
        with passes.nth(len(means)):
            means.append(run(amp.descent_batches(batches)))
        note_idle(amp)
    except BaseException:
        forget_pass(model)
        clear()
        raise
    finally:
        amp.restore()
        gather_anew(model)
    if accelerator.scaler is not None:
        amp.propagate_overflow()
    return means[0]


def _guard(
    amp: AMP, model: nn.Module, batch_norm: BatchNormPolicy, rng: RngPolicy, generators: list[Any]
) -> ExtraPasses:
    passes, wanted = _GUARDS.get(amp), (model, batch_norm, rng, generators)
    if passes is None or (passes.module, passes.batch_norm, passes.rng, passes.generators) != wanted:
        passes = _GUARDS[amp] = ExtraPasses(model, batch_norm=batch_norm, rng=rng, generators=generators)
    return passes


def _check(accelerator: Accelerator, amp: AMP, batches: Sequence[Any]) -> None:
    if amp.attached:
        raise RuntimeError("the optimizer is attached to a module, which makes the ascent; detach() it first")
    if not accelerator.sync_gradients:
        raise RuntimeError(
            "amp_backward() takes a whole accumulation window at once; call it outside accelerator.accumulate()"
        )
    if len(batches) == 0:
        raise ValueError("amp_backward() needs at least one micro-batch")
    host = accelerator.distributed_type.value
    inexact = f"{host}; use DDP or FSDP2" if host in _INEXACT_HOSTS else ""
    if host == "FSDP":
        inexact = inexact_settings(accelerator)
    if inexact:
        raise ValueError(f"amp_backward() does not work exactly with {inexact}")


def watch_accelerate() -> None:
    """Let accelerate raise an error where it would silently drop a closure that was meant for AMP."""
    when_imported("accelerate.optimizer")(_check_dropped_closures)


def _check_dropped_closures(module: Any) -> None:
    step = module.AcceleratedOptimizer.step

    @functools.wraps(step)
    def checked_step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None and not self.gradient_state.sync_gradients and find_amp(self) is not None:
            raise RuntimeError(
                "within accelerator.accumulate() accelerate calls step(closure) only for the last micro-batch of a"
                " window, and drops the others; use amp_plugin.amp_backward or amp_plugin.attach"
            )
        return step(self, closure)

    module.AcceleratedOptimizer.step = checked_step
