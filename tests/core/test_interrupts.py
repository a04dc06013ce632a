"""An interrupt (Ctrl-C, SIGTERM turned into SystemExit) at any line of a pass leaves the weights at theta.

torch runs forward hooks with ``always_call=True`` after an `Exception` only, so a `BaseException` takes another way.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from problems import parameters_of
from torch import Tensor, nn
from torch.nn import functional as F

import amp_plugin
from amp_plugin import AMP, ExtraPasses, LossModule, attach

PACKAGE = str(Path(amp_plugin.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
X, Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1])
AMP_ARGS: dict[str, Any] = {"lr": 0.1, "epsilon": 0.1, "inner_iter": 2, "momentum": 0.9}
Line = tuple[str, int, str]  # file, number, function
Step = Callable[[], object]


class InterruptAt:
    """Runs something, and raises KeyboardInterrupt at one of the lines that run in some folders."""

    def __init__(self, run: Step, folders: tuple[str, ...], at: int | None = None) -> None:
        self.lines: list[Line] = []
        self._folders, self._at = folders, at
        self.raised = False
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            run()
        except KeyboardInterrupt:
            self.raised = True
        finally:
            sys.settrace(before)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._on_line if frame.f_code.co_filename.startswith(self._folders) else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            if len(self.lines) - 1 == self._at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._on_line


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def closure_door() -> tuple[nn.Module, AMP, Step]:
    """With lr 0, because what the base optimizer's step changes is no perturbation."""
    model = net()
    optimizer = AMP(model.parameters(), **{**AMP_ARGS, "lr": 0.0})
    passes = ExtraPasses(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    return model, optimizer, lambda: optimizer.step(closure, passes=passes)


def attached() -> tuple[nn.Module, AMP, Step]:
    module = LossModule(net(), F.cross_entropy)
    optimizer = AMP(module.parameters(), **AMP_ARGS)
    attach(optimizer, module)
    return module, optimizer, lambda: module(X, Y)["loss"].backward()


def interrupt_everywhere(
    door: Callable[[], tuple[nn.Module, AMP, Step]], folders: tuple[str, ...], *, once: bool
) -> None:
    """At every line that runs, or the first time each does."""
    _, _, step = door()
    step()
    lines = InterruptAt(step, folders).lines
    points = sorted({line: k for k, line in reversed(list(enumerate(lines)))}.values()) if once else range(len(lines))
    assert len(points) > 100, "it must be the code that is traced"
    dirty: list[Line] = []
    for at in points:
        module, optimizer, step = door()
        step()  # caches are filled
        before = parameters_of(module)
        interrupted = InterruptAt(step, folders, at)
        torch.set_grad_enabled(True)  # an interrupt at the end of torch's own `with` leaves it off
        assert interrupted.raised or interrupted.lines[at][2] == "__del__" or not once
        clean = all(torch.equal(p, before[name]) for name, p in module.named_parameters())
        if optimizer.perturbed or not clean:
            dirty.append(interrupted.lines[at])
    assert not dirty


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts in __del__
@pytest.mark.parametrize("door", [closure_door, attached])
def test_an_interrupt_at_any_line_of_the_package_leaves_the_weights_clean(door: Any) -> None:
    interrupt_everywhere(door, (PACKAGE,), once=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("door", [closure_door, attached])
def test_an_interrupt_at_any_moment_in_the_package_and_in_torch_leaves_the_weights_clean(door: Any) -> None:
    interrupt_everywhere(door, (PACKAGE, TORCH), once=False)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_real_ctrl_c_finds_clean_weights_at_once_and_training_goes_on(where: str, at_call: int) -> None:
    """In the `except` block already, where a script saves what it has."""

    class CtrlC(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return grads[0]

    module, optimizer, step = attached()
    step()
    before, calls = parameters_of(module), 0

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at_call and where == "forward":
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(CtrlC.apply(outputs) if calls == at_call and where == "backward" else outputs, targets)

    module.criterion = criterion
    try:
        step()
    except KeyboardInterrupt:
        assert not optimizer.perturbed
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    else:
        pytest.fail("not interrupted")
    optimizer.zero_grad()
    step()
    optimizer.step()
    assert not torch.equal(module.model[0].weight, before["model.0.weight"])
