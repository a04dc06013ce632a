"""The tie between a module and AMP: the hooks that make the passes of a step inside the module's own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from amp_plugin.core.compilation import not_compiled, not_compiled_itself
from amp_plugin.core.distributed import data_parallel
from amp_plugin.core.gathered import gather_anew, is_fully_sharded
from amp_plugin.core.inputs import detached_inputs
from amp_plugin.core.loss import LossPlace, loss_of, with_tensors
from amp_plugin.core.module_parts import parameters_of
from amp_plugin.core.optimizer import AMP
from amp_plugin.core.outputs import graph_tensors
from amp_plugin.core.replay import ExtraPasses
from amp_plugin.core.sharding import is_distributed
from amp_plugin.doors.perturbed_backward import AtDisplacement, PerturbedBackward
from amp_plugin.doors.window import ascend_over

# The attachment, in this thread, whose module is between the begin and the end of its perturbed forward pass.
_running: ContextVar[Attachment | None] = ContextVar("running", default=None)
# A generator that yields the arguments of each call of the module in an ascent, and is sent a list of the output.
_Passes = Generator[tuple[tuple[Any, ...], dict[str, Any]], Any, int]


class Attachment:
    """The tie between a module and an optimizer. A copy of the module, by `copy` or by `pickle`, is not attached.

    Attributes:
        loss: loss of the last training pass at theta, 0-d; None before the first pass, and where the ascent policy
            makes no pass at theta.
        amp_loss: loss of the last training pass at theta + delta, 0-d; None where the step does not ascend.
        grad_scale: upstream gradient of the last loss, rounded down to a power of two, 0-d. With a gradient scaler that
            is the loss scale, which the ascent needs too. None before the first backward pass.
        handles: handles of the hooks that :meth:`detach` removes.
    """

    def __init__(
        self,
        amp: AMP | None,
        module: nn.Module | None,
        passes: ExtraPasses | None,
        sync: bool,
        loss: LossPlace | None = None,
    ) -> None:
        self.loss: Tensor | None = None
        self.amp_loss: Tensor | None = None
        self.amp, self.module, self.passes, self._sync_ascent = amp, module, passes, sync
        self._place = loss
        self._ascending = False  # whether the hooks see a pass of the ascent, which they leave alone
        self._inputs: tuple[Any, Any] | None = None  # of the descent's forward pass, if they are a part of the call's
        self._forward: ExitStack | None = None  # the guard of the descent's forward pass, while that runs
        self.grad_scale: Tensor | None = None
        self.handles: list[RemovableHandle] = []
        if amp is None or module is None:
            return
        self._sharded = is_fully_sharded(module)
        # torch runs the forward hook after a pass that fails, but not after a KeyboardInterrupt, so the call is guarded
        # as well. Copies of the module do not keep the attribute `_compiled_call_impl`. A proxy (Lightning Fabric's)
        # would set attributes of the module inside, hence vars().
        self._compiled_call = vars(module).get("_compiled_call_impl")
        self._call = self._compiled_call or module._call_impl
        try:
            amp.attached = True
            vars(module)["_compiled_call_impl"] = self.guarded_call
            # The hooks surround all others on the module: FSDP gathers the weights in a hook, after the ascent.
            before = module.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True)
            self.handles.append(before)
            self.handles.append(module.register_forward_hook(self.after, with_kwargs=True, always_call=True))
        except BaseException:
            self.detach()
            raise

    def __reduce__(self) -> Any:
        return Attachment, (None, None, None, True)

    def detach(self) -> None:
        """Leave the module and the optimizer as they were before :func:`attach`."""
        if self.amp is None or self.module is None:
            return
        amp, attributes = self.amp, vars(self.module)
        self.amp = self.module = self.passes = None
        with ExitStack() as undo:  # all of it, whatever fails
            undo.callback(setattr, amp, "attached", False)
            undo.callback(amp.restore)
            for handle in self.handles:
                undo.callback(handle.remove)
            if attributes.get("_compiled_call_impl") == self.guarded_call:
                attributes["_compiled_call_impl"] = self._compiled_call

    @not_compiled_itself
    def guarded_call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; an exception of any kind, KeyboardInterrupt among them, finds the weights at theta."""
        try:
            return self._call(*args, **kwargs)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Go back to theta after a forward pass that has failed, and forget the pass."""
        if self.amp is not None:
            self.amp.restore()
        if _running.get() is self:
            _running.set(None)
        if self._forward is not None:
            forward, self._forward = self._forward, None
            forward.close()

    @not_compiled_itself
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make the ascent, as a forward pre-hook; return the arguments for the descent, if they are not all.

        The generator of the ascent only says what to call; the call is here, because torch.compile would not compile a
        call from a generator.
        """
        passes = self._ascent(module, args, kwargs)
        call = _advance(passes)
        while call is not None:
            try:
                output = [module(*call[0], **call[1])]  # which the generator empties: see _passes
            except BaseException as error:
                _advance(passes, error=error)
                raise
            call = _advance(passes, output)
        inputs, self._inputs = self._inputs, None
        return inputs

    @not_compiled
    def _ascent(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Passes:
        """Check the call, make the ascent, prepare the forward pass of the descent; return the number of passes."""
        amp, passes = self.amp, self.passes
        if amp is None or passes is None or self._ascending or not (module.training and torch.is_grad_enabled()):
            return 0
        if _running.get() is not None:
            raise RuntimeError("an attached module was called in the forward pass of another one; attach only one")
        if amp.perturbed:
            raise RuntimeError("an attached module was called while its weights are perturbed by optimizer.ascend()")
        if not amp.perturbs:
            return 0
        self._check_module(module)
        made = yield from self._passes(amp, passes, module, args, kwargs)
        batch = [(args, kwargs)]
        rest = amp.descent_batches(batch)
        self._inputs = None if rest is batch else rest[0]
        _running.set(self)
        self._forward = ExitStack()
        self._forward.enter_context(passes.nth(made))
        return made

    @not_compiled
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Go back to theta after the forward pass of the descent; let the backward pass of the loss return there.

        This is the forward hook, so what it returns takes the place of the module's output.
        """
        amp = self.amp
        if amp is None or self._forward is None or self._ascending:
            return None
        forward, self._forward = self._forward, None
        _running.set(None)
        if amp.perturbed:
            gather_anew(module)  # only the backward pass may see these weights again
        seen = self.passes.seen() if self.passes and amp.perturbed and output is not None else None
        try:
            forward.close()
            loss = self._loss_of(output) if output is not None else None  # None: the forward pass failed
        except BaseException:
            amp.restore()
            raise
        if loss is None:
            amp.restore()
            return None
        if not amp.perturbed:
            self.loss, self.amp_loss = loss.detach().clone(), None
            return None
        assert self.passes is not None
        assert seen is not None
        amp.progress.suspend()
        descent = PerturbedBackward(amp, self.passes, amp.perturbation.suspend(), seen, self._note_scale)
        # The loop may write to the loss that it gets, and a compiled module to the one that it has returned. So the
        # losses to be looked at have memory of their own, which one kernel fills.
        clean = loss.detach().clone() if self.loss is None else self.loss.to(loss)
        shown, self.amp_loss = torch.stack([clean, loss.detach()]).unbind()
        self.loss = None if self.loss is None else shown
        given = {id(t) for t in (loss, *graph_tensors(args, kwargs))}
        old = [loss, *(t for t in graph_tensors(output) if id(t) not in given)]
        new = AtDisplacement.apply(descent, clean, *old)
        descent.watch(new)
        return with_tensors(output, new[0], old, new, module, place=self._place)

    def _loss_of(self, output: Any) -> Tensor:
        assert self.module is not None
        return loss_of(output, self.module, place=self._place)

    def _note_scale(self, scale: Tensor) -> None:
        self.grad_scale = scale

    def _check_module(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError("an attached module does not work in nn.DataParallel; use DistributedDataParallel")
        if is_fully_sharded(module) and not self._sharded:
            raise RuntimeError("attach() came before fully_shard() on the same module; call fully_shard() first")
        if self.amp is not None:
            check_held(self.amp, module)
            self.amp.name_parameters(module)  # a layer that was replaced is chosen by its name

    def _passes(self, amp: AMP, passes: ExtraPasses, module: nn.Module, args: Any, kwargs: Any) -> _Passes:
        """Make the ascent; return the number of its passes."""
        made, self.loss = 0, None
        step = amp.progress
        over = (step.descents or step.factors or step.ascents) and not amp.has_gradients()
        if over and all(p.grad is None for p in parameters_of(module)):
            amp.zero_grad()  # forget a step that the gradient scaler skipped
        ddp = data_parallel(module)
        if ddp is not None and ddp.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) loses count of the passes that it does not synchronise"
                " (https://github.com/pytorch/pytorch/issues/143580), as an attached module's ascents are; leave"
                " static_graph off"
            )
        scale = self.grad_scale
        self._ascending = True
        try:
            ascent = ascend_over(
                amp,
                passes,
                module,
                [(args, kwargs)],
                1.0 if scale is None else scale,
                sync=self._sync_ascent,
                within_forward=True,
                culprit=f"{type(module).__name__} changes its input",
            )
            with closing(ascent):
                for [(args_, kwargs_)], _ in ascent:
                    # CUDA graphs of a compiled module record which outputs are alive in a backward pass, so this has
                    # to be the same in all: the loss alone.
                    loss = self._loss_of((yield detached_inputs(args_), detached_inputs(kwargs_)).pop())
                    if not loss.requires_grad:
                        raise RuntimeError("the loss of an attached module requires no gradient, so there is no ascent")
                    if made == 0:
                        self.loss = loss.detach().clone()  # a compiled module may reuse the memory in its next pass
                    passes.spare_leaves(loss)
                    with torch.autocast(loss.device.type, enabled=False):
                        loss.backward(None if scale is None else scale.to(loss).expand_as(loss))  # type: ignore[no-untyped-call]
                    del loss
                    made += 1
        except BaseException:
            amp.restore()
            raise
        finally:
            self._ascending = False
        return made


@not_compiled
def _advance(passes: _Passes, output: Any = None, error: BaseException | None = None) -> Any:
    """Advance the generator; return the arguments of the next call of the module, or None when no call is left."""
    try:
        return passes.send(output) if error is None else passes.throw(error)
    except StopIteration:
        return None


def check_held(amp: AMP, module: nn.Module) -> None:
    """Raise ValueError unless the module holds all parameters of the optimizer."""
    held = {id(p) for p in parameters_of(module)}
    params = [p for group in amp.param_groups for p in group["params"]]
    missing = [p for p in params if id(p) not in held and not is_distributed(p)]  # FSDP swaps in gathered ones at times
    if missing:
        raise ValueError(
            f"{len(missing)} of the optimizer's parameters (the first of shape {tuple(missing[0].shape)}) are not in"
            " the module, so their gradient would not be AMP's; attach to the module that holds all of them"
        )
