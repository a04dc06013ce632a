"""Any sequence of calls: the weights are clean unless the optimizer says otherwise, and it never trains without AMP."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from arbitrary import same_bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from amp_plugin import AMP, attach, detach


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 3))
        self.without_b = False

    def forward(self) -> Tensor:
        return (self.a if self.without_b else torch.tanh(self.b @ self.a)).square().sum()


class Calls(RuleBasedStateMachine):
    """What a loop, a host or a user may call, in any order; what is refused must be a RuntimeError."""

    @initialize(inner_iter=st.integers(1, 2), norm=st.sampled_from(["tensor", "global"]), attached=st.booleans())
    def begin(self, inner_iter: int, norm: Any, attached: bool) -> None:
        self.module = Loss()
        self.optimizer = AMP(self.module.parameters(), 0.1, 0.2, inner_iter=inner_iter, norm=norm, momentum=0.9)
        self.optimizer.base_optimizer.register_step_pre_hook(lambda *_: self.about_to_train())
        self.optimizer.base_optimizer.register_step_post_hook(lambda *_: self.trained())
        self.loss: Tensor | None = None
        self.saved: Any = None
        self.perturbed_backwards = 0  # among those that the gradients are from
        self.trained()
        if attached:
            attach(self.optimizer, self.module)

    def trained(self) -> None:
        self.theta = [p.detach().clone() for p in self.module.parameters()]

    def about_to_train(self) -> None:
        assert all(map(same_bits, self.module.parameters(), self.theta))
        if self.optimizer.perturbs and self.optimizer.param_groups[0]["lr"] > 0.0 and self.optimizer.gradients():
            assert self.perturbed_backwards

    @rule()
    def forward(self) -> None:
        with suppress(RuntimeError):
            self.loss = self.module()

    @rule(retain_graph=st.booleans())
    def backward(self, retain_graph: bool) -> None:
        if self.loss is not None:
            displaced: list[bool] = []
            handle = self.module.a.register_hook(lambda grad: displaced.append(self.optimizer.perturbed))
            with suppress(RuntimeError):
                self.loss.backward(retain_graph=retain_graph)
                self.perturbed_backwards += any(displaced)
            handle.remove()

    @rule()
    def forward_and_backward(self) -> None:
        self.forward()
        self.backward(retain_graph=False)

    @rule()
    def ascend(self) -> None:
        with suppress(RuntimeError):
            self.optimizer.ascend()
            self.perturbed_backwards = 0

    @rule()
    def step(self) -> None:
        with suppress(RuntimeError):
            self.optimizer.step()

    @rule(fails_in=st.sampled_from([None, None, 0, 1, 2]))
    def step_with_closure(self, fails_in: int | None) -> None:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            self.zero_grad()
            self.forward_and_backward()
            if calls - 1 == fails_in:
                raise RuntimeError("in the closure")
            assert self.loss is not None
            return self.loss

        with suppress(RuntimeError):
            self.optimizer.step(closure)

    @rule()
    def restore(self) -> None:
        self.optimizer.restore()

    @rule()
    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.perturbed_backwards = 0

    @rule()
    def overflow(self) -> None:
        for grad in self.optimizer.gradients():
            grad.mul_(torch.inf)

    @rule()
    def save(self) -> None:
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    @rule()
    def load(self) -> None:
        if self.saved is not None:
            with suppress(RuntimeError):
                self.optimizer.load_state_dict(self.saved)

    @rule()
    def copy(self) -> None:
        with suppress(RuntimeError):
            copy.deepcopy((self.module, self.optimizer))

    @rule()
    def evaluate(self) -> None:
        with torch.no_grad():
            self.module()

    @rule(lr=st.sampled_from([0.0, 0.1]))
    def schedule(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    @rule(without_b=st.booleans())
    def leave_out(self, without_b: bool) -> None:
        self.module.without_b = without_b

    @precondition(lambda self: not self.optimizer.perturbed)
    @rule()
    def attach_or_detach(self) -> None:
        detach(self.module) if self.optimizer.attached else attach(self.optimizer, self.module)

    @invariant()
    def the_weights_are_clean_unless_the_optimizer_says_otherwise(self) -> None:
        if hasattr(self, "optimizer"):
            assert not (self.optimizer.attached and self.optimizer.perturbed)
            if not self.optimizer.perturbed:
                assert all(map(same_bits, self.module.parameters(), self.theta))


@pytest.mark.filterwarnings("ignore:AMP. ")
@pytest.mark.parametrize("sequences", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_sequence_of_calls(sequences: int) -> None:
    profile = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Calls, settings=settings(profile, max_examples=sequences, stateful_step_count=25))
