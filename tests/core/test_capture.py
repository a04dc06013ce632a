"""Whole steps without the host: equal to those it takes part in, and replayed as CUDA would replay them."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.counting import CountCalls
from tape import on_tape
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from amp_plugin import AMP, CapturedStep, ExtraPasses, LossModule, attach
from amp_plugin.core import capture, captured_call, replay
from amp_plugin.core.async_scalar import AsyncScalar

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "fused": True}
ADAMW: dict[str, Any] = {"base_optimizer": "AdamW", "lr": 0.01, "fused": True}
BASES = pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
Step = Callable[[Tensor, Tensor], Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int, spoilt: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """Some whose loss is NaN."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        images = torch.randn(16, 6, dtype=torch.float64, generator=generator)
        if i in spoilt:
            images[3, 2] = torch.nan
        made.append((images, torch.randint(3, (16,), generator=generator)))
    return made


def closure_step(model: nn.Module, optimizer: AMP) -> Step:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        loss: Tensor = optimizer.step(closure)
        return loss

    return step


def attached_step(model: nn.Module, optimizer: AMP) -> Step:
    module = LossModule(model, F.cross_entropy)
    attach(optimizer, module, rng="fresh")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def passes_step(model: nn.Module, optimizer: AMP) -> Step:
    """One that leaves the weights where an error finds them."""
    passes = ExtraPasses(model, rng="fresh")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with passes.clean():
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
        optimizer.ascend()
        with passes.perturbed():
            F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return loss.detach()

    return step


WAYS = pytest.mark.parametrize("way", [closure_step, attached_step])


def trained(
    way: Callable[..., Step], data: list[tuple[Tensor, Tensor]], *, capture: bool = False, **kwargs: Any
) -> tuple[list[Tensor], nn.Module, AMP]:
    """The losses, the model and the optimizer after a step on each batch."""
    model = net()
    optimizer = AMP(model.parameters(), epsilon=0.05, inner_lr=0.5, **kwargs)
    step = way(model, optimizer)
    if not capture:
        return [step(*batch) for batch in data], model, optimizer
    images, labels = (torch.empty_like(t) for t in data[0])
    captured = CapturedStep(lambda: step(images, labels), optimizer, warm_up=1)
    losses = []
    for batch in data:
        images.copy_(batch[0])
        labels.copy_(batch[1])
        losses.append(captured().clone())
    return losses, model, optimizer


def assert_same(a: Any, b: Any) -> None:
    """Losses, weights, running statistics and the optimizer's state."""
    assert [loss.item() for loss in a[0]] == pytest.approx([loss.item() for loss in b[0]], abs=0, nan_ok=True)
    for x, y in zip(a[1].state_dict().values(), b[1].state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    states = [tree_leaves(run[2].state_dict()["state"]) for run in (a, b)]
    for x, y in zip(*states, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@BASES
@WAYS
@pytest.mark.parametrize("spoilt", [(), (0,), (2, 3)])
@pytest.mark.filterwarnings("ignore:AMP. the ascent gradient had NaN")
def test_the_device_decides_as_the_host_does(way: Any, base: dict[str, Any], spoilt: tuple[int, ...]) -> None:
    data = batches(6, spoilt)
    told = trained(way, data, **base)
    alone = trained(way, data, capturable=True, **base)
    assert told[2].skipped_steps == alone[2].skipped_steps == len(spoilt)
    weights = [parameter.isfinite().all() for parameter in alone[1].parameters()]
    assert all(weights)
    for name, p in told[1].named_parameters():
        torch.testing.assert_close(p, alone[1].get_parameter(name), rtol=0, atol=0)


@BASES
@WAYS
@pytest.mark.parametrize("inner_iter", [1, 2])
@pytest.mark.parametrize("spoilt", [(), (4,)])
def test_replayed_steps_are_those_of_python(
    way: Any, base: dict[str, Any], inner_iter: int, spoilt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(captured_call.RECORDERS, "cpu", on_tape)
    data = batches(6, spoilt)
    eager = trained(way, data, capturable=True, inner_iter=inner_iter, **base)
    replayed = trained(way, data, capture=True, capturable=True, inner_iter=inner_iter, **base)
    assert_same(eager, replayed)
    assert replayed[2].skipped_steps == len(spoilt)


@WAYS
def test_nothing_is_sent_to_the_host(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: AsyncScalar, value: Tensor) -> None:
        raise AssertionError("a value was sent")

    monkeypatch.setattr(AsyncScalar, "__init__", send)
    trained(way, batches(2), capturable=True, **SGD)
    with pytest.raises(AssertionError, match="was sent"):
        trained(way, batches(2), **SGD)


@pytest.mark.filterwarnings("ignore:AMP. the ascent gradient had NaN")
@pytest.mark.parametrize("capturable", [False, True])
def test_a_gradient_scaler_lowers_its_scale_after_either_pass_overflowed(capturable: bool) -> None:
    model = net()
    optimizer = AMP(model.parameters(), epsilon=0.05, inner_lr=0.5, capturable=capturable, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    scales = []
    for i, (images, labels) in enumerate(batches(4)):
        before = copy.deepcopy(model.state_dict())
        for pass_number in range(2):
            bad = (i, pass_number) in {(1, 0), (2, 1)}
            scaler.scale(F.cross_entropy(model(images), labels) * (torch.inf if bad else 1.0)).backward()
            if pass_number == 0:
                optimizer.ascend(grad_scale=scaler.get_scale())
        optimizer.propagate_overflow()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        same = all(torch.equal(before[name], p) for name, p in model.named_parameters())
        assert same == (i in (1, 2))
    assert scales == [4.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [False, True])
def test_a_gradient_scaler_asks_the_host_nothing_in_a_captured_step_of_an_attached_module(bad: bool) -> None:
    model = net()
    optimizer = AMP(model.parameters(), epsilon=0.05, inner_lr=0.5, capturable=True, **SGD)
    module = LossModule(model, F.cross_entropy)
    attach(optimizer, module, rng="fresh")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    [(images, labels)] = batches(1, (0,) if bad else ())
    before = copy.deepcopy(model.state_dict())
    scaler.scale(module(images, labels)["loss"]).backward()
    with CountCalls() as count:
        scaler.step(optimizer)
    assert count.syncs == {}
    same = all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert same == bad


class FailingError(Exception):
    pass


@pytest.mark.parametrize("place", ["ascent", "descent", "end"])
@pytest.mark.parametrize("way", [closure_step, attached_step, passes_step])
def test_a_step_that_cannot_be_captured_is_told_and_made_as_it_is(
    way: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the recorded part has left behind: weights that it did not move, gradients that it did not make."""
    recording = False

    def record(step: Callable[[], Any], stream: Any) -> Any:
        nonlocal recording
        recording = True
        try:
            return on_tape(step)
        finally:
            recording = False

    def fail(module: nn.Module, args: Any) -> None:
        passes.append(1)
        if recording and place != "end" and len(passes) % 2 == (place == "ascent"):
            raise FailingError("the host asked\nfor a value")

    data = batches(6)
    expected = trained(way, data, capturable=True, **SGD)
    monkeypatch.setitem(captured_call.RECORDERS, "cpu", record)
    passes: list[int] = []
    model = net()
    model.register_forward_pre_hook(fail)
    optimizer = AMP(model.parameters(), epsilon=0.05, inner_lr=0.5, capturable=True, **SGD)
    step = way(model, optimizer)
    images, labels = (torch.empty_like(t) for t in data[0])

    def whole() -> Tensor:
        loss: Tensor = step(images, labels)
        if recording and place == "end":
            raise FailingError("the host asked\nfor a value")
        return loss

    captured, losses = CapturedStep(whole, optimizer, warm_up=2), []
    with warnings.catch_warnings(record=True) as record_of_warnings:
        warnings.simplefilter("always")
        for batch in data:
            images.copy_(batch[0])
            labels.copy_(batch[1])
            losses.append(captured().clone())
    assert_same(expected, (losses, model, optimizer))
    told = [w for w in record_of_warnings if "cannot be captured" in str(w.message)]
    assert len(told) == 1
    assert str(told[0].message).endswith("FailingError: the host asked")
    assert told[0].filename == __file__


@pytest.mark.parametrize("broken_off", [False, True])
def test_what_a_failed_capture_leaves_in_torch_is_put_right(broken_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch ends the allocation to the pool itself, unless CUDA has broken the capture off; that is an error twice."""
    done: list[str] = []
    streams = ["current"]

    @contextlib.contextmanager
    def on_stream(stream: str) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams[:] = streams[: streams.index(stream, 1)]

    @contextlib.contextmanager
    def graph(*args: Any, stream: str, **kwargs: Any) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            if broken_off:
                raise torch.AcceleratorError("operation failed due to a previous error during capture")
            streams.pop()

    def end(device: int, pool: str) -> None:
        if not broken_off:
            raise RuntimeError("not currently recording to this pool")
        done.append(f"end {pool} of {device}")

    def fail() -> None:
        assert not gc.isenabled(), "a graph of an earlier training could be freed"
        raise FailingError("not permitted")

    state = SimpleNamespace(clone_state=lambda: "clone", graphsafe_set_state=done.append)
    cuda = {"CUDAGraph": object, "graph_pool_handle": lambda: "pool", "graph": graph, "stream": on_stream}
    cuda |= {"current_stream": lambda: streams[-1], "current_device": lambda: 0, "default_generators": (state,)}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda device, pool: done.append(f"release {pool} of {device}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    with pytest.raises(FailingError, match="not permitted"):
        captured_call._cuda_graph(fail, "side")  # type: ignore[arg-type]
    assert gc.isenabled()
    assert streams == ["current"]
    assert done == (["end pool of 0", "release pool of 0", "clone"] if broken_off else [])


def test_a_learning_rate_that_is_a_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(captured_call.RECORDERS, "cpu", on_tape)
    optimizer = AMP(net().parameters(), capturable=True, **SGD)
    with pytest.warns(UserWarning, match="repeats the learning rate of its capture"):
        CapturedStep(lambda: None, optimizer)
    tensors = AMP(net().parameters(), capturable=True, **{**SGD, "lr": torch.tensor(0.1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CapturedStep(lambda: None, tensors)


def freeze(model: nn.Module, optimizer: AMP) -> None:
    next(iter(model.children())).requires_grad_(False)


def other_memory(model: nn.Module, optimizer: AMP) -> None:
    for p in model.parameters():
        p.data = p.data * 0.75


def load(model: nn.Module, optimizer: AMP) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["momentum_buffer"].mul_(0.5)
    optimizer.load_state_dict(state)


@WAYS
@pytest.mark.parametrize("change", [freeze, other_memory, load])
def test_what_has_moved_between_two_steps_is_captured_anew(
    way: Any, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(capture: bool, *, changes: bool = True) -> Any:
        model = net()
        optimizer = AMP(model.parameters(), epsilon=0.05, inner_lr=0.5, capturable=True, **SGD)
        step = way(model, optimizer)
        images, labels = (torch.empty_like(t) for t in data[0])
        call: Any = lambda: step(images, labels)  # noqa: E731
        captured = CapturedStep(call, optimizer, warm_up=1) if capture else call
        losses = []
        for i, batch in enumerate(data):
            images.copy_(batch[0])
            labels.copy_(batch[1])
            if i == 4 and changes:
                change(model, optimizer)
            losses.append(captured().clone())
        return losses, model, optimizer

    monkeypatch.setitem(captured_call.RECORDERS, "cpu", on_tape)
    data = batches(8)
    assert_same(run(capture=False), run(capture=True))
    with pytest.raises(AssertionError):
        assert_same(run(capture=False), run(capture=True, changes=False))


@pytest.mark.parametrize(("together", "calls"), [(False, 3), (True, 11)])
def test_a_process_group_takes_longer_to_warm_up(together: bool, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def record(step: Callable[[], Any], stream: Any) -> Any:
        recorded.append(len(made))
        return step, None

    monkeypatch.setitem(captured_call.RECORDERS, "cpu", record)
    monkeypatch.setattr(capture, "in_process_group", lambda: together)
    made: list[int] = []
    optimizer = AMP(net().parameters(), capturable=True, **{**SGD, "lr": torch.tensor(0.1)})
    captured = CapturedStep(lambda: made.append(1), optimizer)
    for _ in range(calls + 2):
        captured()
    assert recorded == [calls]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_numbers_of_a_captured_step(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a module draws none, its generator is left alone; where it draws some, the passes cannot share them."""
    monkeypatch.setattr(replay, "_CAPTURED", ("cpu",))
    model = nn.Sequential(net(), nn.Dropout(dropout))
    passes = ExtraPasses(model)
    x = batches(1)[0][0]
    with passes.clean():
        model(x)
    with passes.perturbed():
        model(x)
    monkeypatch.setattr(replay, "_is_capturing", lambda: True)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a generator was read"))
    if dropout:
        with pytest.raises(RuntimeError, match=r"draws some on cpu\): take rng='fresh'"), passes.clean():
            pass
        return
    with passes.clean():
        model(x)
    with passes.perturbed():
        model(x)


def test_copies_and_checkpoints_count_on() -> None:
    data = batches(3, (1,))
    losses, model, optimizer = trained(closure_step, data, capturable=True, **SGD)
    assert losses
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert (twin.skipped_steps, twin.capturable) == (1, True)
    spoilt = data[1]
    closure_step(twin_model, twin)(*spoilt)
    assert (twin.skipped_steps, optimizer.skipped_steps) == (2, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fused": None}, "fused=True"),
        ({"base_optimizer": "RMSprop", "nesterov": None, "fused": None}, "fused=True"),
        ({"dampening": 0.1, "nesterov": False}, "dampening"),
        ({"ascent": "every(2)"}, "ascent="),
    ],
)
def test_what_cannot_be_captured_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AMP(net().parameters(), capturable=True, **{k: v for k, v in {**SGD, **wrong}.items() if v is not None})


def test_a_step_in_which_the_host_decides_is_not_captured() -> None:
    optimizer = AMP(net().parameters(), **SGD)
    with pytest.raises(ValueError, match="capturable=True"):
        CapturedStep(lambda: None, optimizer)
    with pytest.raises(ValueError, match="warm_up"):
        CapturedStep(lambda: None, AMP(net().parameters(), capturable=True, **SGD), warm_up=0)
