"""torch.compile in every door: compiled code runs in every pass, is compiled once, and trains as eager code does."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from doors import DOORS, Door, Step, by_ascend, by_attach, by_closure, plain_loop
from problems import SGD_ARGS, InOneSlot, parameters_of, small_batches, small_net
from timm.task import ClassificationTask
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.nn import functional as F

from amp_plugin import AMP, LossModule, Perturbation, attach
from amp_plugin.core.bucket import Ascent
from amp_plugin.core.compilation import detached_for_good

STEPS, INNER_ITER = 10, 2
Way = Callable[[nn.Module, AMP, Any], Step]  # given a model, its optimizer and a backend


class CountingBackend:
    """Compiles with inductor, or with AOTAutograd alone, and counts how often forward and backward graphs run."""

    def __init__(self, *, inductor: bool) -> None:
        self.compiled: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self._inductor = inductor

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        if self._inductor:
            return compile_fx(graph, inputs, inner_compile=self._inductor_graph)
        forward, backward = (functools.partial(self._aot_graph, name) for name in ("forward", "backward"))
        return aot_autograd(fw_compiler=forward, bw_compiler=backward)(graph, inputs)

    def _inductor_graph(self, graph: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        name = "backward" if kwargs.get("is_backward") else "forward"
        return self._counted(name, compile_fx_inner(graph, inputs, **kwargs))

    def _aot_graph(self, name: str, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return self._counted(name, make_boxed_func(graph.forward))

    def _counted(self, name: str, run: Any) -> Any:
        self.compiled[name] += 1

        def counted(*args: Any) -> Any:
            self.runs[name] += 1
            return run(*args)

        counted._boxed_call = True  # type: ignore[attr-defined]
        return counted


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.callback_handler.clear()
    torch._dynamo.reset()


# --- what is compiled, and when; fullgraph: a graph break is an error


def compiled_model(door: Door) -> Way:
    def way(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
        return door(LossModule(torch.compile(model, backend=backend, fullgraph=True), F.cross_entropy), optimizer)

    return way


def attach_then_compile(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    module = LossModule(model, F.cross_entropy)
    attach(optimizer, module)
    return plain_loop(torch.compile(module, backend=backend, fullgraph=True), optimizer)


def compile_then_attach(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    module: Any = torch.compile(LossModule(model, F.cross_entropy), backend=backend, fullgraph=True)
    return by_attach(module, optimizer)


def compile_then_attach_inside(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    """As the stock Trainer does with torch_compile=True: its callback sees the model without the wrapper."""
    module = LossModule(model, F.cross_entropy)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    attach(optimizer, module)
    return plain_loop(compiled, optimizer)


def attach_then_compile_in_place(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    module = LossModule(model, F.cross_entropy)
    step = by_attach(module, optimizer)
    module.compile(backend=backend, fullgraph=True)
    return step


def compile_in_place_then_attach(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    module = LossModule(model, F.cross_entropy)
    module.compile(backend=backend, fullgraph=True)
    return by_attach(module, optimizer)


def timm_task_compiles_its_model(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    task = ClassificationTask(model, F.cross_entropy, verbose=False).train()
    task.compile(backend=backend, fullgraph=True)
    return plain_loop(task, optimizer)


def compiled_timm_task(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    task = ClassificationTask(model, F.cross_entropy, verbose=False).train()
    return plain_loop(torch.compile(task, backend=backend, fullgraph=True), optimizer)


def compiled_training_step(door: Door) -> Way:
    """Passes, ascent and descent; the graph breaks where the optimizer or autograd is called."""

    def way(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
        step: Step = torch.compile(door(LossModule(model, F.cross_entropy), optimizer), backend=backend)
        return step

    return way


def compiled_optimizer(door: Door) -> Way:
    def way(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
        for name in ("step", "ascend", "restore", "zero_grad"):
            setattr(optimizer, name, torch.compile(getattr(optimizer, name), backend=backend))
        return door(LossModule(model, F.cross_entropy), optimizer)

    return way


WAYS: dict[str, Way] = {
    "closure, compiled model": compiled_model(by_closure),
    "ascend, compiled model": compiled_model(by_ascend),
    "attach, compiled model": compiled_model(by_attach),
    "attach, then compile": attach_then_compile,
    "compile, then attach": compile_then_attach,
    "compile, then attach inside": compile_then_attach_inside,
    "attach, then compile in place": attach_then_compile_in_place,
    "compile in place, then attach": compile_in_place_then_attach,
    "timm task that compiles its model": timm_task_compiles_its_model,
    "compiled timm task": compiled_timm_task,
    "ascend, compiled training step": compiled_training_step(by_ascend),
    "attach, compiled training step": compiled_training_step(by_attach),
}
# Here nothing but the optimizer is left to compile, and its own steps are never traced: right, whoever calls them.
UNTRACED: dict[str, Way] = {
    "closure, compiled training step": compiled_training_step(by_closure),
    **{f"{door.__name__}, compiled optimizer": compiled_optimizer(door) for door in DOORS},
}


def eager(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
    return by_closure(LossModule(model, F.cross_entropy), optimizer)


def train(way: Way, backend: Any = None, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[int]]:
    """The trained model, and how many compilations there had been after each step."""
    model = small_net(dtype, dropout=0.3, activation=nn.SiLU)
    args: dict[str, Any] = {**SGD_ARGS, "lr": 0.05}
    optimizer = AMP(model.parameters(), epsilon=0.1, inner_lr=0.5, inner_iter=INNER_ITER, **args)
    step = way(model, optimizer, backend)
    addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    compilations: list[Any] = []
    so_far = []
    torch._dynamo.callback_handler.register_start_callback(compilations.append)
    torch.manual_seed(5)
    for batch in small_batches(STEPS, dtype=dtype):
        step(batch)
        so_far.append(len(compilations))
    assert not optimizer.perturbed
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == addresses
    return model, so_far


def relative_difference(a: nn.Module, b: nn.Module) -> float:
    """||a - b|| / ||b|| over all weights, and over all running statistics; the larger one."""
    pairs = [(a.parameters(), b.parameters()), (a.buffers(), b.buffers())]
    vectors = [[torch.cat([t.detach().double().flatten() for t in ts]) for ts in pair] for pair in pairs]
    return max(float((x - y).norm() / y.norm()) for x, y in vectors)


def check(way: Way, *, inductor: bool, dtype: torch.dtype, tolerance: float) -> None:
    backend = CountingBackend(inductor=inductor)
    expected, _ = train(eager, dtype=dtype)
    model, compilations = train(way, backend, dtype)
    passes = STEPS * (INNER_ITER + 1)
    assert backend.runs == {"forward": passes, "backward": passes}, "compiled code in every pass"
    assert backend.compiled == {"forward": 1, "backward": 1}
    assert set(compilations[1:]) == {compilations[1]}, "nothing is compiled again as weights and versions change"
    assert relative_difference(model, expected) < tolerance


@pytest.mark.parametrize("way", WAYS)
def test_compiled_passes_train_as_eager_ones_do(way: str) -> None:
    check(WAYS[way], inductor=False, dtype=torch.float64, tolerance=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("way", WAYS)
def test_inductor_trains_as_eager_code_does(way: str, dtype: torch.dtype, tolerance: float) -> None:
    with torch._inductor.config.patch(fallback_random=True):  # eager's dropout masks
        check(WAYS[way], inductor=True, dtype=dtype, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["closure, compiled model", "attach, compiled model", "compile, then attach inside"])
def test_all_passes_of_a_step_see_inductors_own_dropout_mask(way: str) -> None:
    """With a vanishing ball AMP must be SGD, which it is not when each pass draws masks of its own."""
    weights = []
    for epsilon in (1e-30, 0.0):
        torch._dynamo.reset()
        model = small_net(dropout=0.5, activation=nn.SiLU)
        step = WAYS[way](model, AMP(model.parameters(), 0.05, epsilon=epsilon, inner_iter=INNER_ITER), "inductor")
        torch.manual_seed(5)
        for batch in small_batches(STEPS):
            step(batch)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.linalg.vector_norm(weights[0] - weights[1]) < 1e-6 * torch.linalg.vector_norm(weights[1])


@pytest.mark.parametrize("way", UNTRACED)
def test_the_optimizer_itself_is_left_out_of_compiled_graphs(way: str) -> None:
    backend = CountingBackend(inductor=False)
    expected, _ = train(eager)
    model, compilations = train(UNTRACED[way], backend)
    assert relative_difference(model, expected) == 0.0
    assert not backend.runs
    assert set(compilations[1:]) == {compilations[1]}


def test_the_ball_may_be_moved_in_a_compiled_function() -> None:
    compilations: list[Any] = []
    torch._dynamo.callback_handler.register_start_callback(compilations.append)

    def trained(compiled: Callable[[Any], Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        ball, params = Perturbation(), [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, 2))]

        def step() -> None:
            for _ in range(INNER_ITER):
                ball.ascend([Ascent(p, p.detach().sin(), 0.5, 0.1) for p in params])
            loss = torch.stack([p.exp().sum() for p in params]).sum()
            displacement = ball.suspend()
            theta.extend(p.detach().clone() for p in params)
            ball.resume(displacement)
            loss.backward()
            ball.restore()
            with torch.no_grad():
                for p in params:
                    p.sub_(0.1 * p.grad)
                    p.grad = None

        theta: list[torch.Tensor] = []
        compiled_step = compiled(step)
        for _ in range(STEPS):
            compiled_step()
            so_far.append(len(compilations))
        return [*theta, *(p.detach() for p in params)]

    so_far: list[int] = []
    expected = trained(lambda function: function)
    seen = trained(functools.partial(torch.compile, backend="aot_eager"))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(seen, expected, strict=True))
    assert so_far[-1] == so_far[-STEPS + 1] > 0, "compiled in the first two steps, and not again"


def test_a_compiled_model_stays_compiled_in_a_compiled_training_step() -> None:
    def way(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
        step: Step = torch.compile(WAYS["closure, compiled model"](model, optimizer, backend), backend=backend)
        return step

    check(way, inductor=False, dtype=torch.float64, tolerance=1e-10)


@pytest.mark.parametrize("door", DOORS)
def test_the_base_optimizers_step_may_be_compiled(door: Door) -> None:
    def way(model: nn.Module, optimizer: AMP, backend: Any) -> Step:
        base = optimizer.base_optimizer
        base.step = torch.compile(base.step, backend=backend)  # type: ignore[method-assign]
        return door(LossModule(model, F.cross_entropy), optimizer)

    backend = CountingBackend(inductor=False)
    expected, _ = train(eager)
    model, compilations = train(way, backend)
    assert relative_difference(model, expected) < 1e-10
    assert backend.runs == {"forward": STEPS}
    assert set(compilations[2:]) == {compilations[2]}, "the first step differs: it makes the momentum"


@pytest.mark.slow
def test_compiled_autograd_is_right_or_refused() -> None:
    """It records a whole backward pass before any of it runs, so nothing can move the weights at its beginning."""
    enable = torch._dynamo.compiled_autograd._enable
    expected, _ = train(eager)
    for door in (by_closure, by_ascend):
        with enable(torch.compile(backend="aot_eager")):
            model, _ = train(lambda model, amp, _, door=door: door(LossModule(model, F.cross_entropy), amp))  # type: ignore[misc]
        assert relative_difference(model, expected) < 1e-10
    module = LossModule(small_net(), F.cross_entropy)
    optimizer, before = AMP(module.parameters(), 0.1), parameters_of(module)
    step = by_attach(module, optimizer)
    with (
        enable(torch.compile(backend="aot_eager")),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        step(small_batches(1)[0])
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_what_a_closure_returned_is_not_overwritten_by_graphs_of_a_compiled_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slot, (batch,) = torch.zeros(()), small_batches(1)
    model = small_net()
    optimizer = AMP(model.parameters(), epsilon=0.1, inner_lr=0.5, **SGD_ARGS)
    clean = F.cross_entropy(model(batch[0]), batch[1]).item()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = InOneSlot.apply(F.cross_entropy(model(batch[0]), batch[1]), slot)
        loss.backward()
        return {"loss": loss}

    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", ModuleType("as if there were such graphs"))
    assert optimizer.step(closure)["loss"].item() == pytest.approx(clean, rel=1e-6)
    assert slot.item() > clean


def test_no_output_is_copied_without_such_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)  # a reset() imports it
    value = torch.ones(3)
    (kept,) = detached_for_good((value,))
    assert kept.data_ptr() == value.data_ptr()
