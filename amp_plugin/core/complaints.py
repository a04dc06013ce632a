"""What AMP has to say of a training step: that it trains as something else than AMP, or may do so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amp_plugin.core.bucket import Ascent
from amp_plugin.core.norms import LOW_PRECISION
from amp_plugin.core.perturbation import is_hooked
from amp_plugin.core.step import Step
from amp_plugin.core.warn import warn_user

if TYPE_CHECKING:
    from amp_plugin.core.optimizer import AMP


def may_perturb(amp: AMP) -> bool:
    """Return False, and warn once, if passes without the gradients outside the ball would have none at all."""
    if not amp.selection.prunes(amp.param_groups) or any(
        p.requires_grad for p in amp.selection.within(amp.param_groups)
    ):
        return True
    amp.warn_once(
        "AMP: none of the parameters that are to be perturbed requires a gradient, so the steps are the base"
        " optimizer's (this is said once); if that is not intended, see parameters= and requires_grad"
    )
    return False


def check_ball(amp: AMP, ascents: Sequence[Ascent], *, along_gradients: bool) -> None:
    """Warn, once, of an ascent that moves little or nothing.

    Raises:
        RuntimeError: hooks have consumed the gradients.
    """
    if any(a.param.dtype in LOW_PRECISION for a in ascents):
        amp.warn_once("AMP on 16-bit weights loses small displacements; use float32 and autocast")
    if not ascents or not along_gradients or any(a.grad is not None for a in ascents):
        return
    if any(is_hooked(a.param) for a in ascents):
        raise RuntimeError(
            "AMP found no gradient after a pass, and the parameters have hooks: an optimizer that steps inside the"
            " backward pass cannot be used with AMP; let AMP's base_optimizer make the step"
        )
    amp.warn_once("AMP: a pass left no gradient to ascend along", RuntimeWarning)


def check_ascents(amp: AMP, step: Step) -> None:
    """Raise RuntimeError unless the step has made the ascents that the hyper-parameters ask for.

    A step whose passes have left no gradient at all is as harmless as the base optimizer's.
    """
    if step.rest is not None:
        raise RuntimeError(
            f"ascent={str(amp.policy)!r} spares the descent the samples of the ascent: make its pass over"
            " optimizer.descent_batches([batch]), or take ascent='subset(...)', whose descent is on all"
        )
    harmless = step.plain or (step.idle and not amp.has_gradients())
    if step.ascents == amp.inner_iter or step.descents or harmless:
        return
    if amp.attached:
        raise RuntimeError(
            "AMP.step() found no gradient of the attached module, so it would train without the perturbation that you"
            " asked for. Before each step call that module itself (not its parts, a copy of it, or module.forward()) in"
            " training mode, module.train(), with gradients on, and then backward() on the loss that it returned; or"
            " amp_plugin.detach(module)"
        )
    raise RuntimeError(
        f"AMP.step() without a closure needs {amp.inner_iter} ascent step(s) before it, got {step.ascents}; it"
        " would train without the perturbation that you asked for. Use one of: optimizer.step(closure);"
        " loss.backward(), optimizer.ascend(), loss.backward(), optimizer.step(); the same with `for _ in"
        " optimizer.ascent_passes(): loss.backward()`, whatever the ascent policy; amp_plugin.attach(optimizer,"
        " module) with a module that returns its loss; amp_plugin.AMPTrainer; amp_plugin.AMPMixin before"
        " another class of Trainer, such as TRL's; or amp_plugin.doors.fastai.AMPCallback."
        " (After an interrupted step, optimizer.restore() starts afresh.)"
    )


def check_closure_gradients(amp: AMP, ascended: bool, before: Mapping[Tensor, Tensor], versions: list[int]) -> None:
    """Raise RuntimeError if no pass has left a gradient of its own; warn of gradients that the closure has kept.

    Args:
        amp: optimizer whose closure has made all passes.
        ascended: whether an ascent had a gradient.
        before: gradients from before the step, by parameter.
        versions: version counters of these gradients when the pass of the descent began.
    """
    kept = [p.grad is grad for p, grad in before.items()]
    as_they_were = all(kept) and [grad._version for grad in before.values()] == versions
    if before and not ascended and as_they_were and len(amp.gradients()) == len(before):
        raise RuntimeError(
            "the closure that step() was given has left no gradient: it has to compute the loss and call backward(). If"
            " the host gave step() a closure of its own (Lightning's manual optimization does), use"
            " amp_plugin.attach(optimizer, module) with a module that returns its loss"
        )
    if any(kept):
        amp.warn_once(
            "AMP: step(closure) found gradients from before, and the closure does not clear them: they are part of the"
            " descent, but the ascent is along the closure's own gradient alone. To accumulate gradients over"
            " micro-batches use amp_plugin.attach, amp_backward or AMPTrainer"
        )


def check_step(amp: AMP, step: Step) -> None:
    """Warn, once, of what makes a step that is over another one than AMP's, or raise RuntimeError."""
    amp.perturbation.check_undisturbed()
    if step.aimless and amp.has_gradients():
        raise RuntimeError(
            "the passes before the ascent left no gradient, but the pass of the descent did: call backward() on the"
            " loss in each pass, or the step would train without the perturbation that you asked for"
        )
    if any(factor.value() < 0 for factor in (step.factors if step.unread is None else step.unread)):
        raise RuntimeError(
            "the loss of an attached module was multiplied by a negative number before backward(), so the ascent went"
            " to its best point instead of the worst; do that inside the module that is attached, e.g."
            " LossModule(model, criterion)"
        )
    if complaint := amp.others_check.check():
        amp.warn_once(f"AMP: {complaint}")
    if amp.delta_check.was_unseen():
        amp.warn_once(
            "AMP: the gradients at theta + delta are those at theta, so the loop does not see the perturbation, and"
            " this trains as the base optimizer does. The optimizer may hold copies of the weights (give it the"
            " parameters that the model computes with), or something caches what is computed from them"
        )
    if step.ascents and not amp.capturable:
        amp.delta_check.descend(amp.perturbation)
    # In the ascent pass others may have required no gradient; by now each that requires one has it.
    if number := sum(p.grad is not None for p in step.unreached):
        amp.warn_once(
            f"AMP: {number} parameters of the ball (parameters={amp.selection.parameters!r}) have a gradient, but had"
            " none in the ascent pass, so they were not perturbed: gradient checkpointing with use_reentrant=True"
            " drops the gradients behind an input that requires none; take use_reentrant=False"
        )


def tell_of_skipped_step(amp: AMP) -> None:
    """Warn, once, that a step was skipped; :attr:`AMP.skipped_steps` counts them."""
    amp.warn_once(
        "AMP: the ascent gradient had NaN or infinite entries; the step was skipped and the weights left as they were"
        " (optimizer.skipped_steps counts such steps, and this is said once)",
        RuntimeWarning,
    )


def tell_of_loaded_options(amp: AMP, before: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Warn if a checkpoint has replaced AMP's hyper-parameters, or is of a training with another ascent policy."""
    for name in ("epsilon", "inner_lr"):
        changes = {(b[name], s[name]) for b, s in zip(before, saved, strict=True) if s.get(name, b[name]) != b[name]}
        for mine, theirs in sorted(changes):
            warn_user(
                f"AMP: the checkpoint's {name}={theirs:g} replaces {mine:g}; to go on with {mine:g} set"
                f" group[{name!r}] in optimizer.param_groups after loading"
            )
    kept = {name for group in saved for name in group if name.startswith("ascent_")}
    if "epsilon" in saved[0] and kept != set(amp.policy.state):
        warn_user(
            f"AMP: the checkpoint is of a training with another ascent policy than {str(amp.policy)!r}, which is"
            " followed from now on"
        )
