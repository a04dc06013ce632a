"""AMP inside a module's forward and backward passes, for loops that know nothing of it.

The module must return its loss. In training mode a call of the module first makes the ascent (`inner_iter` passes, at
theta and beyond) and then runs the module at theta + delta; the weights are at theta again when the call returns. The
backward pass of the returned loss goes to theta + delta once more and comes back when it ends, however it ends. So the
gradient that ``loss.backward()`` leaves is AMP's, and at no other time is a weight displaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from amp_plugin.core.find import find_amp
from amp_plugin.core.gathered import gather_anew
from amp_plugin.core.loss import LossPlace
from amp_plugin.core.module_parts import parts_of
from amp_plugin.core.replay import BatchNormPolicy, ExtraPasses, RngPolicy
from amp_plugin.doors.attachment import Attachment, check_held


def attach(
    optimizer: Optimizer,
    module: nn.Module,
    *,
    batch_norm: BatchNormPolicy = "clean",
    rng: RngPolicy = "same",
    generators: Sequence[Any] = (),
    sync_ascent: bool = True,
    loss: LossPlace | None = None,
) -> Attachment:
    """Make a module that returns its loss train with AMP in a plain ``loss.backward(); optimizer.step()`` loop.

    A training forward pass costs ``inner_iter + 1`` passes, or less with an ascent policy. The loss that it returns has
    the value at theta and the gradient at theta + delta; other outputs are those of the pass at theta + delta (with
    ``ascent="split(0.25)"`` of the descent's samples alone), and to differentiate them is an error, because the ascent
    follows the loss alone. With gradient accumulation each micro-batch is perturbed for itself
    (:class:`amp_plugin.AMPTrainer` treats the window as one batch). In eval mode, or without gradients, the module is
    left alone.

    Args:
        optimizer: an :class:`amp_plugin.AMP`, also inside accelerate's wrapper or timm's Lookahead.
        module: module whose forward returns the mean loss of the batch, a mapping with ``"loss"``, an object with
            ``.loss``, or a tuple that begins with the loss. For a model and a criterion see
            :class:`amp_plugin.LossModule`. ``fully_shard`` comes first.
        batch_norm: passes that update running statistics, see :class:`amp_plugin.ExtraPasses`; default ``"clean"``.
        rng: random numbers of the passes, see :class:`amp_plugin.ExtraPasses`; default ``"same"``.
        generators: generators of the module's own, see :class:`amp_plugin.ExtraPasses`; default none.
        sync_ascent: whether DDP's processes average the ascent's gradients, so that any number of them equals one; if
            not, each process perturbs along its own gradient. Default True.
        loss: where the module's output has the loss, if it is none of the places above: an index or a key,
            ``loss=1`` for a module that returns ``(logits, loss)``, or a function of the output that returns a tensor
            in it. Default None.

    Returns:
        The attachment, with the losses of the last forward pass. ``detach(module)`` undoes it.

    Raises:
        TypeError: the optimizer is not AMP, or a generator is of an unknown kind.
        ValueError: the module does not hold the optimizer's parameters; or it, a part of it or the optimizer is
            attached already.
    """
    module, amp = _called(module), find_amp(optimizer)
    if amp is None:
        raise TypeError(f"attach() needs amp_plugin.AMP, got {type(optimizer).__name__}")
    if amp.attached:
        raise ValueError("this optimizer is attached to a module already; detach() that first")
    if next(attachments(module), None) is not None:
        raise ValueError("this module, or a part of it, is attached already; detach() it first")
    gather_anew(module)  # for the names are of the parameters, not of what an evaluation has gathered
    check_held(amp, module)
    amp.name_parameters(module)
    passes = ExtraPasses(module, batch_norm=batch_norm, rng=rng, generators=generators)
    return Attachment(amp, module, passes, sync_ascent, loss)


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`, or raise ValueError if the module is not attached."""
    for attachment in attachments(module):
        if attachment.module is _called(module):
            attachment.detach()
            return
    raise ValueError(f"this {type(module).__name__} is not attached")


def attachments(module: nn.Module) -> Iterator[Attachment]:
    """Yield the attachments of a module and of its parts."""
    for part in parts_of(module):
        for hook in part._forward_pre_hooks.values():
            attachment = getattr(hook, "__self__", None)
            if isinstance(attachment, Attachment) and attachment.module is part:
                yield attachment


def _called(module: nn.Module) -> nn.Module:
    """Return the module inside Lightning Fabric's wrapper, which lets nobody but Fabric differentiate its outputs."""
    called: nn.Module = getattr(module, "_forward_module", module)
    return called
