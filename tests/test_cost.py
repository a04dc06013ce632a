"""What a step costs beyond its passes: kernel calls, host synchronisations and memory, counted on PreActResNet18."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amp_plugin import AMP

# Change how memory is described, not what is in it: they launch nothing.
VIEWS = {
    "aten.view.dtype",
    "aten.view_as_real.default",
    "aten.unbind.int",
    "aten.detach.default",
    "aten.alias.default",
}
HOST_SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item")


def storages(tensors: Any) -> dict[int, int]:
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tree_leaves(tensors)
        if isinstance(t, Tensor)
    }


class CountCalls(TorchDispatchMode):
    """Counts the operators that are dispatched, and the bytes of the storages that they create."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        before = storages((args, kwargs))
        self.allocated += sum(n for address, n in storages(result).items() if address not in before)
        return result

    @property
    def kernels(self) -> int:
        return sum(n for name, n in self.calls.items() if name not in VIEWS)

    @property
    def syncs(self) -> dict[str, int]:
        return {name: n for name, n in self.calls.items() if any(s in name for s in HOST_SYNCS)}


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
            held = vars(optimizer._perturbation) | {"parked": optimizer._parked}
            nested = [list(v.values()) + list(v) if isinstance(v, dict) else v for v in held.values()]
            own = storages(nested)
            for p in model.parameters():
                own.pop(p.untyped_storage().data_ptr(), None)
            assert weights <= sum(own.values()) <= weights + 10_000
    momentum = storages([s["momentum_buffer"] for s in optimizer.state.values()])
    assert sum(momentum.values()) == weights, "the state is the base optimizer's alone"
