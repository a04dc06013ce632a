"""The passes of ``step(closure)``: a method of :class:`amp_plugin.AMP` that lets a closure make all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from amp_plugin.core import complaints
from amp_plugin.core.compilation import detached_for_good
from amp_plugin.core.distributed import in_process_group

if TYPE_CHECKING:
    from amp_plugin.core.optimizer import AMP
    from amp_plugin.core.replay import ExtraPasses


def passes_by_closure(self: AMP, closure: Callable[[], Any], passes: ExtraPasses | None) -> Any:
    """Make all passes of a step by calls of the closure; return what the first call returned."""
    if self.progress.moved:
        self.restore()
        raise RuntimeError("step(closure) after ascend(): call step() without a closure; the ascent was dropped")
    step, ascends, ascended = self.progress, self.ascends, False
    results: list[Any] = []
    step.set_aside = {p: p.grad for p in self._params() if p.grad is not None} if ascends else {}
    try:
        if ascends:
            self._set_gradients({})
        for _ in self.passes_of_step(None, prune=not in_process_group(), passes=passes):
            results.append(detached_for_good(closure()))
            ascended |= self.has_gradients()
        if ascends:
            self._set_gradients(step.set_aside)
        before, versions = step.set_aside, [grad._version for grad in step.set_aside.values()]
        with passes.nth(len(results)) if passes else nullcontext():
            results.append(closure())
        complaints.check_closure_gradients(self, ascended, before, versions)
        self.restore()
    except BaseException:
        self.restore()
        self._set_gradients({})
        self.end_step()
        raise
    finally:
        step.set_aside = None
    return results[0]
