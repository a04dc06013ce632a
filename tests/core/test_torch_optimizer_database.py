"""PyTorch's own optimizer database, `torch.testing._internal.common_optimizers`, with AMP around every optimizer in it.

The optimizers, the arguments to try (also with foreach and fused), the schedules and the arguments that must be refused
are torch's. The tests have the names of torch's generic ones (test/test_optim.py of its repository), which are not
installed with it. Of those, these do not apply:

| torch's test | why |
| --- | --- |
| `..._multigpu`, `..._large_tensor`, `..._cuda...`, `peak_memory`, `mixed_device_dtype`, cudagraphs | need a GPU; AMP's tests on one are `-m cuda` |
| `foreach_matches_forloop`, `fused_matches_forloop`, `load_nontensor_step`, `non_empty_state` | are about the base optimizer's own kernels and state, which AMP does not touch; each is compared with a step by hand here |
| `defaults_changed_to_foreach`, `set_default_dtype_works_with_foreach` | replace the base optimizer's inner functions |
| `fused_does_not_step_if_foundinf` | is the scaler's, in test_gradient_scaler.py |
| `step_is_noop_when_params_have_no_grad` | a step without a gradient is told by AMP: nothing may train unperturbed in silence |
| `param_groups_lr`, `param_groups_weight_decay` | test_a_step_by_hand has two groups with an lr and a weight_decay each |
| arguments with `differentiable` | a step that is itself differentiated needs the graph that AMP does not keep; torch's generic tests leave it out too |
| inputs with `capturable` | are for CUDA; there AMP has an argument of this name itself |
"""  # noqa: E501

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from amp_plugin import AMP

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

# The import freezes torch's global flags, for every later test of the process.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        _get_optim_inputs_including_global_cliquey_kwargs,
        optim_db,
    )
    from torch.testing._internal.common_utils import TestCase

pytestmark = pytest.mark.slow

EPSILON, INNER_LR = 0.02, 0.1  # so that some ascents end within the ball and some on its edge

NOT_AROUND = {
    "LBFGS": "needs a closure of its own in every step",
    "SparseAdam": "takes sparse gradients alone, along which AMP does not ascend",
}
OWN_WORDS = {  # for arguments that AMP checks before the base optimizer does
    r"Invalid (momentum|weight_decay) value: .*": r"\1 must be a finite number >= 0",
    "Tensor lr must be 1-element": "lr must be a finite number >= 0",
}


def around(info: OptimizerInfo) -> Callable[..., AMP]:
    """The class of the database, with AMP around it."""
    members = {"__init__": partialmethod(AMP.__init__, base_optimizer=info.optim_cls)}
    return type(f"AMP{info.name}", (AMP,), members)


INFOS = {info.name: info for info in optim_db if info.name not in NOT_AROUND}
every_optimizer = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


def inputs_of(info: OptimizerInfo) -> list[OptimizerInput]:
    return _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float64, info, skip=("differentiable",))


every_input = pytest.mark.parametrize(
    ("info", "index"),
    [pytest.param(info, k, id=f"{n}-{i.desc}") for n, info in INFOS.items() for k, i in enumerate(inputs_of(info))],
)


class Problem:
    """Ten numbers that a linear layer brings to nought; Muon takes matrices alone."""

    def __init__(self, info: OptimizerInfo, *, contiguous: bool = True, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        weight, bias = torch.randn(10, 5, 2, dtype=dtype)[..., 0], torch.randn(10, 2, dtype=dtype)[..., 0]
        parts = [weight] if info.name == "Muon" else [weight, bias]
        self.parameters = [nn.Parameter(part.contiguous() if contiguous else part) for part in parts]
        self.x = torch.randn(5, dtype=dtype)

    def groups(self) -> list[dict[str, Any]]:
        """One group has the arguments of the optimizer, another one, where there are two parameters, has its own."""
        own: list[dict[str, Any]] = [{}, {"lr": 3e-3, "weight_decay": 0.05}]
        return [{"params": [p], **options} for p, options in zip(self.parameters, own, strict=False)]

    def loss(self) -> Tensor:
        y = self.parameters[0].mv(self.x)
        return sum(self.parameters[1:], y).square().sum()

    def backward(self) -> Tensor:
        for p in self.parameters:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss


def trained(problem: Problem, optimizer: AMP, steps: int = 4) -> list[Tensor]:
    for _ in range(steps):
        optimizer.step(problem.backward)
    return [p.detach().clone() for p in problem.parameters]


def ball(problem: Problem, sign: float) -> Iterator[Tensor]:
    """The paper's delta for each tensor, which goes downhill where the training maximises."""
    for p in problem.parameters:
        assert p.grad is not None
        delta = sign * INNER_LR * p.grad
        yield delta * min(1.0, EPSILON / delta.norm().item())


def test_the_database_is_complete() -> None:
    assert {info.name for info in optim_db} == {*INFOS, *NOT_AROUND}


def test_the_optimizers_that_amp_refuses() -> None:
    infos = {info.name: info for info in optim_db}
    parameters = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="LBFGS needs a closure of its own"):
        around(infos["LBFGS"])(parameters)
    amp = around(infos["SparseAdam"])(parameters)
    with pytest.raises(RuntimeError, match="sparse"):
        amp.step(lambda: setattr(parameters[0], "grad", torch.ones(3).to_sparse()))


@every_input
def test_a_step_by_hand(info: OptimizerInfo, index: int) -> None:
    by_amp, by_hand = Problem(info), Problem(info)
    kwargs = inputs_of(info)[index].kwargs
    amp = around(info)(by_amp.groups(), epsilon=EPSILON, inner_lr=INNER_LR, **kwargs)
    base = info.optim_cls(by_hand.groups(), **inputs_of(info)[index].kwargs)
    start = [p.detach().clone() for p in by_hand.parameters]
    for _ in range(4):
        by_hand.backward()
        theta = [p.detach().clone() for p in by_hand.parameters]
        with torch.no_grad():
            for p, delta in zip(by_hand.parameters, ball(by_hand, -1 if kwargs.get("maximize") else 1), strict=True):
                p += delta
        by_hand.backward()
        with torch.no_grad():
            for p, value in zip(by_hand.parameters, theta, strict=True):
                p.copy_(value)
        base.step()
    torch.testing.assert_close(trained(by_amp, amp), [p.detach() for p in by_hand.parameters], rtol=1e-12, atol=1e-12)
    assert all((p != q).any() for p, q in zip(start, by_hand.parameters, strict=True)), "the steps are steps"


@every_input
def test_epsilon_0_is_the_base_optimizer_to_the_bit(info: OptimizerInfo, index: int) -> None:
    by_amp, alone = Problem(info), Problem(info)
    amp = around(info)(by_amp.groups(), epsilon=0.0, **inputs_of(info)[index].kwargs)
    base = info.optim_cls(alone.groups(), **inputs_of(info)[index].kwargs)
    for _ in range(4):
        alone.backward()
        base.step()
    assert all(map(torch.equal, trained(by_amp, amp), alone.parameters))


@every_optimizer
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(info: OptimizerInfo, contiguous: bool) -> None:
    for schedulers in ((), *info.scheduler_inputs):
        for given in info.optim_inputs_func(device="cpu"):
            problem = Problem(info, contiguous=contiguous)
            optimizer = around(info)(problem.parameters, epsilon=1e-4, **given.kwargs)
            made = [scheduler(optimizer) for scheduler in schedulers]
            first = problem.loss().item()
            for _ in range(20):
                loss = optimizer.step(problem.backward)
                for scheduler in made:
                    scheduler.step(*[loss] if isinstance(scheduler, ReduceLROnPlateau) else [])
            change = problem.loss().item() - first
            assert change > 0 if given.kwargs.get("maximize") else change < 0, given.desc


@every_input
def test_state_dict_deterministic(info: OptimizerInfo, index: int) -> None:
    one, other = Problem(info, dtype=torch.float32), Problem(info, dtype=torch.float32)
    optimizer = around(info)(one.groups(), epsilon=EPSILON, **inputs_of(info)[index].kwargs)
    weights = trained(one, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = around(info)(other.groups(), epsilon=EPSILON, **inputs_of(info)[index].kwargs)
    twin.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, value in zip(other.parameters, weights, strict=True):
            p.copy_(value)
    assert all(map(torch.equal, trained(one, optimizer), trained(other, twin)))
    TestCase().assertEqual(optimizer.state_dict(), twin.state_dict(), rtol=0, atol=0)  # noqa: PT009


@every_optimizer
def test_can_load_older_state_dict(info: OptimizerInfo) -> None:
    """States from before torch had some of the options, and states of the base optimizer alone."""
    for given in info.optim_inputs_func(device="cpu"):
        problem = Problem(info)
        optimizer = around(info)(problem.parameters, epsilon=EPSILON, **given.kwargs)
        trained(problem, optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for name in (*info.not_og_supported_flags, "epsilon", "inner_lr"):
                group.pop(name, None)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["epsilon"] == EPSILON
        trained(problem, optimizer, steps=1)


@every_optimizer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo, duplicate: Callable[[AMP], AMP]) -> None:
    for given in info.optim_inputs_func(device="cpu"):
        problem = Problem(info)
        optimizer = AMP(problem.parameters, base_optimizer=info.optim_cls, **given.kwargs)
        trained(problem, optimizer)
        twin = duplicate(optimizer)
        assert {k for k in vars(twin) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
        assert repr(twin) == repr(optimizer)


@every_optimizer
def test_step_all_hooks(info: OptimizerInfo) -> None:
    """A hook on a step fires once a step, not once a pass."""
    problem, calls = Problem(info), []
    optimizer = around(info)(problem.parameters)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    trained(problem, optimizer, steps=2)
    assert calls == ["before", "after"] * 2


@every_input
def test_tensor_lr(info: OptimizerInfo, index: int) -> None:
    kwargs = {**inputs_of(info)[index].kwargs, "lr": 1e-2}
    one, other = Problem(info), Problem(info)
    by_number = around(info)(one.parameters, epsilon=EPSILON, **kwargs)
    by_tensor = around(info)(other.parameters, epsilon=EPSILON, **{**kwargs, "lr": torch.tensor(1e-2).double()})
    torch.testing.assert_close(trained(one, by_number), trained(other, by_tensor))


@every_optimizer
def test_grads_are_never_inplaced_into(info: OptimizerInfo) -> None:
    """The gradients of the descent are as the closure left them."""
    problem, seen = Problem(info), []

    def closure() -> Tensor:
        loss = problem.backward()
        seen[:] = [p.grad.clone() for p in problem.parameters if p.grad is not None]
        return loss

    around(info)(problem.parameters, epsilon=EPSILON).step(closure)
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.parameters, seen, strict=True) if p.grad is not None)


@every_optimizer
def test_empty_tensors_do_not_disturb(info: OptimizerInfo) -> None:
    if info.name == "Adafactor":
        pytest.skip("torch's Adafactor itself divides by the number of elements")
    problem = Problem(info)
    empty = nn.Parameter(torch.empty(0, 1, dtype=torch.float64))
    optimizer = around(info)([*problem.parameters, empty], epsilon=EPSILON)

    def closure() -> Tensor:
        empty.grad = torch.zeros_like(empty)
        return problem.backward()

    before = problem.loss().item()
    optimizer.step(closure)
    assert problem.loss().item() != before


@every_optimizer
def test_errors(info: OptimizerInfo) -> None:
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        words = error.error_regex
        for theirs, own in OWN_WORDS.items():
            words = re.sub(theirs, own, words)
        params = given.params if given.params is not None else [nn.Parameter(torch.ones(1, 1))]
        raises = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with raises(error.error_type, match=words):
            optimizer = around(info)(params, **given.kwargs)
            if error.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer.step(lambda params=params: [setattr(p, "grad", torch.ones_like(p)) for p in params])
