"""Gradients that are not the optimizer's: of parameters that other optimizers train, inside the module or beside it.

In every pass such parameters get a gradient, but only the descent's counts.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class GradientsAside:
    """Gradients that are kept out of a pass: what the pass adds is dropped, and what was there before is put back.

    Args:
        params: tensors whose gradients are set aside; default none.
    """

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.add(params)

    def add(self, params: Iterable[Tensor]) -> None:
        """Set aside the gradients of further tensors."""
        for p in params:
            if id(p) not in self._before:
                self._before[id(p)] = p, p.grad
                p.grad = None

    def put_back(self) -> None:
        """Give every tensor the gradient that it had."""
        for p, grad in self._before.values():
            p.grad = grad


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the tensors that the backward pass of a loss leaves a gradient on."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if following := node.next_functions:
            waiting += [node for node, _ in following]
        elif type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)
    return leaves


class OthersCheck:
    """A look, in the first step of a loop whose module is not known, at gradients that add up over its passes."""

    def __init__(self) -> None:
        self._over = False
        self._hooks: list[RemovableHandle] = []  # on tensors, until the optimizer steps
        self._guard: RemovableHandle | None = None  # on other optimizers, until the next step begins
        self._added_up: dict[Tensor, tuple[Tensor, int]] = {}  # with the gradient and its version in the descent

    @contextmanager
    def ascent(self, own: Iterable[Tensor]) -> Iterator[None]:
        """Surround a pass of the ascent, and look when it is over."""
        yield
        self.look(own)

    def look(self, own: Iterable[Tensor]) -> None:
        """Watch the gradients that a pass of the ascent has left on tensors beside the optimizer's own."""
        if self._over:
            self._remove_hooks()
            if self._guard is not None:
                self._guard.remove()
            self._guard, self._added_up = None, {}
            return
        self._over = True
        held = {id(p) for p in own}
        for p in gc.get_objects():  # no list of all parameters exists
            if id(p) not in held and _has_gradient(p):
                note: Any = partial(self._note, p.grad, p.grad._version)
                note.only_looks = True  # another AMP may train this tensor, and must not take the hook for an optimizer
                self._hooks.append(p.register_post_accumulate_grad_hook(note))
        if self._hooks:
            self._guard = register_optimizer_step_pre_hook(self._check_other_optimizer)

    def check(self) -> str | None:
        """Return what to say, when the optimizer steps, of gradients that are sums over passes; None if there are none.

        Raises:
            RuntimeError: something has scaled these gradients, as clipping over the whole model does, or zeroed a part.
        """
        self._remove_hooks()  # another loop's passes may come from now on
        if not self._added_up:
            return None
        if any(p.grad is grad and grad._version != seen and grad.any() for p, (grad, seen) in self._added_up.items()):
            raise RuntimeError(f"AMP: {self._complaint()}")
        return self._complaint()

    def _note(self, before: Tensor, version: int, p: Tensor) -> None:
        _, seen = self._added_up.pop(p, (before, version))
        # A loop that has cleared the gradient since has another one, or has written to it once more.
        if p.grad is before and before._version == seen + 1:
            self._added_up[p] = before, before._version

    def _check_other_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            grad, seen = self._added_up.get(p, (None, 0))
            if grad is not None and p.grad is grad and grad._version == seen:
                raise RuntimeError(f"{type(optimizer).__name__} beside AMP: {self._complaint()}")

    def _complaint(self) -> str:
        first = next(iter(self._added_up))
        return (
            f"{len(self._added_up)} tensors that AMP does not hold (the first of shape {tuple(first.shape)}) have a"
            " gradient that is the sum over all passes of the step, which another optimizer, or clipping over the whole"
            " model, would take for theirs. Give passes=ExtraPasses(module) to step() or ascent_passes(), with a module"
            " that holds them, or clear their gradients after each pass of the ascent"
        )

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _has_gradient(thing: Any) -> bool:
    """Return whether a thing is a leaf of autograd's graphs with a gradient."""
    try:
        is_leaf = type(thing) in (nn.Parameter, Tensor) and thing.requires_grad and thing.is_leaf
    except RuntimeError:  # a view that was made without gradients, and changed since, does not say where it comes from
        return False
    return is_leaf and thing.grad is not None
