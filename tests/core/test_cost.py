"""What a step costs beyond its passes: kernel calls, host synchronisations and memory, counted on PreActResNet18."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from benchmarks.counting import CountCalls, storages
from torch import nn

from amp_plugin import AMP, ExtraPasses
from amp_plugin.core import move


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = timm.create_model("preactresnet18")
    assert len(list(model.parameters())) == 75
    return model


def set_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)


def calls_of_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> CountCalls:
    """The calls of one step with gradients that are there already; for AMP both halves of the step."""
    count = CountCalls()
    for counted in (False, True):  # the first step makes the buffers
        for phase in ("ascend", "step"):
            if hasattr(optimizer, phase):
                set_gradients(model)
                with count if counted else torch.no_grad():
                    getattr(optimizer, phase)()
    return count


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("weight_decay_groups", [False, True])
def test_at_most_twenty_kernel_calls_beyond_the_base_optimizer(
    model: nn.Module, norm: Any, weight_decay_groups: bool
) -> None:
    params: Any = list(model.parameters())
    if weight_decay_groups:
        params = [{"params": params[:40]}, {"params": params[40:], "weight_decay": 0.0}]
    kwargs: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "foreach": True,
    }
    base = calls_of_step(torch.optim.SGD(params, **kwargs), model)
    amp = calls_of_step(AMP(params, norm=norm, **kwargs), model)
    assert base.kernels > 0
    assert 0 < amp.kernels - base.kernels <= 20, amp.calls - base.calls
    assert amp.syncs == {}
    assert amp.allocated - base.allocated < 0.001 * sum(p.nbytes for p in model.parameters()), (
        "no temporary the size of the weights"
    )


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_cuda_launches_at_most_twenty_kernels_and_one_for_each_large_tensor(
    model: nn.Module, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ball around each tensor multiplies its step by a factor of its own, as the kernels for lists cannot."""
    monkeypatch.setattr(move, "_WRITES_OUT", ("cpu",))
    kwargs: dict[str, Any] = {"lr": 0.1, "foreach": True}
    base = calls_of_step(torch.optim.SGD(model.parameters(), **kwargs), model)
    amp = calls_of_step(AMP(model.parameters(), norm=norm, **kwargs), model)
    large = sum(p.numel() > 4096 for p in model.parameters())
    assert 0 < large < 25
    assert amp.launches - base.launches <= 20 + (large if norm == "tensor" else 0), amp.calls - base.calls


def test_statistics_are_a_few_kernels(model: nn.Module) -> None:
    optimizer = AMP(model.parameters(), lr=0.1)
    set_gradients(model)
    optimizer.ascend()
    with CountCalls() as count:
        optimizer.statistics()
    optimizer.restore()
    assert 0 < count.launches <= 12, count.calls
    assert count.syncs == {}


def test_the_state_of_all_layers_is_replayed_by_a_few_kernels(model: nn.Module) -> None:
    """Batch norm's statistics are floats and its counters integers, which no kernel takes together."""
    passes = ExtraPasses(model)
    for count in (CountCalls(), counted := CountCalls()):
        with count, passes.clean():
            pass
        with count, passes.perturbed():
            pass
    assert len(list(model.buffers())) > 50
    assert 0 < counted.launches <= 2 * 4, counted.calls  # save, save, put back, put back; two kinds of number


def test_the_counter_sees_lists_that_cuda_does_not_batch() -> None:
    floats, integers = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3, dtype=torch.int64)]
    factors = [torch.ones(())] * 2
    for lists, launches in (((floats, floats), 1), ((integers, integers), 2), ((floats, factors), 2)):
        with CountCalls() as count:
            torch._foreach_mul_(*lists)
        assert count.launches == launches
    for factor, launches in ((torch.ones(()), 1), (torch.ones((), dtype=torch.float64), 2)):
        with CountCalls() as count:
            torch._foreach_mul_(floats, factor)
        assert count.launches == launches


def test_the_counter_sees_lists_that_are_too_long_for_one_launch() -> None:
    many = [torch.ones(1)] * 600
    for operator, arguments, launches in (
        (torch._foreach_neg_, (many,), 1),  # 770 tensors fit into one launch
        (torch._foreach_add_, (many, many), 2),  # 448 pairs
        (torch._foreach_add, (many, many), 2),  # 336 with their sums
        (torch._foreach_copy_, (many, [t.double() for t in many]), 2),
        (torch._foreach_norm, (many,), 3),
        (torch._foreach_neg_, ([torch.ones(65536 * 2241, dtype=torch.int8)],), 2),  # 2,240 blocks
    ):
        with CountCalls() as count:
            operator(*arguments)
        assert count.launches == launches, operator


def test_the_counter_sees_a_synchronisation() -> None:
    with CountCalls() as count:
        torch.ones(()).item()
    assert count.syncs


def test_memory_beyond_the_base_optimizer_is_one_copy_of_the_weights(model: nn.Module) -> None:
    """Everything the optimizer holds, while the weights are perturbed and after the step."""
    optimizer = AMP(model.parameters(), 0.1, momentum=0.9)
    weights = sum(p.nbytes for p in model.parameters())
    for _ in range(2):
        for phase in (optimizer.ascend, optimizer.step):
            set_gradients(model)
            phase()
            held = vars(optimizer.perturbation) | {"set aside": optimizer.progress.set_aside or {}}
            nested = [list(v.values()) + list(v) if isinstance(v, dict) else v for v in held.values()]
            own = storages(nested)
            for p in model.parameters():
                own.pop(p.untyped_storage().data_ptr(), None)
            assert weights <= sum(own.values()) <= weights + 10_000
    momentum = storages([s["momentum_buffer"] for s in optimizer.state.values()])
    assert sum(momentum.values()) == weights, "the state is the base optimizer's alone"
