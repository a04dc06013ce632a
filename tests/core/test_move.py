"""The move to theta + delta is one addition to each weight, whichever kernels make it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from benchmarks.counting import CountCalls
from doors import by_closure
from problems import SGD_ARGS, assert_same_parameters, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, LossModule
from amp_plugin.core import move as module
from amp_plugin.core.move import CompiledMove, move
from amp_plugin.train.methods.optimizers import ASAM

Kernels = Callable[[list[Tensor], list[Tensor], Tensor, Tensor], None]
SHAPES = [(3,), (), (70, 80), (0,), (5, 4, 3, 3), (100,), (1, 1), (5000,)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["one by one", "small ones written out", "compiled"])
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setattr(module, "_WRITES_OUT", ("cpu",) if request.param == "small ones written out" else ())
    return CompiledMove() if request.param == "compiled" else move


def tensors(dtype: torch.dtype) -> list[Tensor]:
    made = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    made[4] = made[4].to(memory_format=torch.channels_last)
    return made


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("one_factor", [False, True])
def test_each_step_is_multiplied_by_its_factor_and_added(
    kernels: Kernels, dtype: torch.dtype, one_factor: bool
) -> None:
    torch.manual_seed(0)
    for _ in range(2):
        params, steps = tensors(dtype), tensors(dtype)
        factors = torch.rand((), dtype=dtype) if one_factor else torch.rand(len(SHAPES), dtype=dtype)
        expected = [p + s * f for p, s, f in zip(params, steps, factors.expand(len(SHAPES)), strict=True)]
        kernels(params, steps, factors, torch.tensor(True))
        for p, e in zip(params, expected, strict=True):
            assert torch.equal(p, e)


@pytest.mark.parametrize("one_factor", [False, True])
def test_nothing_moves_where_the_steps_are_not_finite(kernels: Kernels, one_factor: bool) -> None:
    torch.manual_seed(0)
    params, steps = tensors(torch.float32), tensors(torch.float32)
    theta = copy.deepcopy(params)
    steps[0][1], steps[2][3, 4], steps[7][0] = float("nan"), float("inf"), -float("inf")
    factors = torch.rand(len(SHAPES))
    factors[0], factors[2], factors[7] = float("nan"), 0.0, float("inf")
    kernels(params, steps, factors[0] if one_factor else factors, torch.tensor(False))
    for p, t in zip(params, theta, strict=True):
        assert torch.equal(p, t)


@pytest.mark.filterwarnings("error")
def test_the_parameters_move_once_where_torch_compiles_nothing(kernels: Kernels) -> None:
    """Torch runs code as it is inside a dispatch mode (a profiler of FLOPs), and where it was compiled too often."""
    params, steps = [torch.ones(3), torch.ones(())], [torch.ones(3), torch.ones(())]
    with CountCalls():
        kernels(params, steps, torch.tensor([2.0, 4.0]), torch.tensor(True))
    assert [p.tolist() for p in params] == [[3.0, 3.0, 3.0], 5.0]
    for size in range(1, 12):
        params, steps = [torch.ones(size)], [torch.ones(size)]
        kernels(params, steps, torch.tensor([2.0]), torch.tensor(True))
        assert params[0].tolist() == [3.0] * size


def test_sixteen_bit_steps_are_multiplied_in_float32(kernels: Kernels) -> None:
    torch.manual_seed(0)
    params, steps = tensors(torch.bfloat16), tensors(torch.bfloat16)
    factors = torch.rand(len(SHAPES))
    expected = [p.double() + s.double() * f for p, s, f in zip(params, steps, factors, strict=True)]
    kernels(params, steps, factors, torch.tensor(True))
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=2**-7, atol=2**-7)


def test_what_a_cuda_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has the addresses of what its kernels read, and keeps no tensor alive that it has not made."""
    monkeypatch.setattr(module, "_WRITES_OUT", ("cpu",))
    module._repeated.cache_clear()
    kept = []
    for _ in range(2):
        for size in range(1, 200):
            steps = [torch.ones(size), torch.ones(3)]
            move([torch.ones(size), torch.ones(3)], steps, torch.ones(2), torch.tensor(True))
        kept.append(module._repeated.cache_info())
    assert kept[0].currsize == kept[1].currsize == kept[1].misses == 199


# --- in training


def train(optimizer_class: type[AMP], *, compiled: bool, **kwargs: Any) -> nn.Module:
    model = small_net()
    optimizer = optimizer_class(model.parameters(), epsilon=0.1, inner_lr=0.5, **SGD_ARGS, **kwargs)
    if compiled:
        optimizer.perturbation.compile()
    step = by_closure(LossModule(model, F.cross_entropy), optimizer)
    for batch in small_batches(4):
        step(batch)
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize(("optimizer_class", "inner_iter"), [(AMP, 1), (AMP, 2), (ASAM, 1)])
def test_a_compiled_ball_trains_as_any_other(
    optimizer_class: type[AMP], inner_iter: int, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module._move_in_one_expression, backend=backend, dynamic=False)
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    kwargs: dict[str, Any] = {"norm": norm, "inner_iter": inner_iter}
    expected = train(optimizer_class, compiled=False, **kwargs)
    assert not graphs
    assert_same_parameters(train(optimizer_class, compiled=True, **kwargs), expected)
    assert len(graphs) == 1


def test_a_compiler_that_fails_is_told_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    expected = train(AMP, compiled=False)
    monkeypatch.setattr(module, "_compiled", lambda: fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_parameters(train(AMP, compiled=True), expected)
    assert [str(w.message) for w in caught] == [
        "AMP: torch.compile failed, so the move is not compiled. RuntimeError: no compiler here"
    ]


def test_a_copy_of_a_compiled_optimizer_trains_on() -> None:
    model = small_net()
    optimizer = AMP(model.parameters(), **SGD_ARGS)
    optimizer.perturbation.compile()
    twin, optimizer_of_twin = copy.deepcopy((model, optimizer))
    step = by_closure(LossModule(twin, F.cross_entropy), optimizer_of_twin)
    [batch] = small_batches(1)
    step(batch)
    assert all(not torch.equal(p, t) for p, t in zip(model.parameters(), twin.parameters(), strict=True))
