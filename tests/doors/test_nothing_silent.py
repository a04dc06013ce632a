"""What would train as something else than AMP is right, or an error or a warning that says so, through every door."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from problems import small_batches, small_net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from amp_plugin import (
    AMP,
    AMPTrainer,
    AMPTrainingArguments,
    ExtraPasses,
    LossModule,
    amp_backward,
    attach,
)
from amp_plugin.core.async_scalar import AsyncScalar
from amp_plugin.core.inputs import BatchWatch, detached_inputs
from amp_plugin.doors import perturbed_backward

Loss = Callable[[Any], Tensor]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.last(torch.tanh(self.first(x))), y)


def tiny_batches(steps: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 4, generator=generator).double(), torch.randint(3, (4,), generator=generator))
        for _ in range(steps)
    ]


def told(record: list[warnings.WarningMessage], words: str) -> list[warnings.WarningMessage]:
    return [w for w in record if words in str(w.message)]


# --- the batch


@dataclass
class Data:
    x: Any
    y: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Any


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda t: t,
    "a tuple": lambda t: (t, 1),
    "nested mappings": lambda t: {"a": {"b": [t]}},
    "a dataclass": Data,
    "a frozen dataclass": Frozen,
    "an object": lambda t: SimpleNamespace(x=t, name="graph"),
    "an object in a mapping": lambda t: {"graph": SimpleNamespace(edges=[t])},
}


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_batch_that_a_pass_changes_is_an_error(holder: str, kind: str) -> None:
    inside: Any = torch.ones(3) if kind == "tensor" else np.ones(3)
    batch = HOLDERS[holder](inside)
    watch = BatchWatch(batch)
    watch.check("it")
    inside += 1
    with pytest.raises(RuntimeError, match=r"^it in place, so a second pass would see another batch"):
        watch.check("it")


@pytest.mark.parametrize("change", ["attribute", "entry"])
def test_a_batch_that_is_given_another_tensor_is_an_error(change: str) -> None:
    batch: Any = Data(torch.ones(3)) if change == "attribute" else {"x": torch.ones(3)}
    watch = BatchWatch(batch)
    if change == "attribute":
        batch.x = torch.zeros(3)
    else:
        batch["x"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="another batch"):
        watch.check("it")


def test_each_pass_has_containers_of_its_own() -> None:
    batch = {"x": torch.ones(2), "graph": Data(torch.ones(2)), "frozen": Frozen(torch.ones(2)), "n": 3}
    own = detached_inputs(batch)
    own["graph"].x = None
    own.pop("x")
    assert batch["graph"].x is not None
    assert batch.keys() == {"x", "graph", "frozen", "n"}
    assert own["frozen"].x is batch["frozen"].x, "tensors are not copied"


def test_a_packed_sequence_is_an_input_like_another() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(4, 5), nn.Linear(5, 3)
            self.double()

        def forward(self, x: Any, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.rnn(x)[1][-1]), y)

    x = pack_padded_sequence(torch.randn(5, 3, 4).double(), [5, 2, 4], enforce_sorted=False)
    y, nets = torch.tensor([0, 1, 2]), [Net(), Net()]
    optimizers = [AMP(net.parameters(), 0.1) for net in nets]
    attach(optimizers[0], nets[0])
    nets[0](x, y).backward()
    optimizers[0].step()

    def closure() -> Tensor:
        optimizers[1].zero_grad()
        loss: Tensor = nets[1](x, y)
        loss.backward()
        return loss

    optimizers[1].step(closure)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


# --- random numbers


@pytest.mark.parametrize(
    "generator", [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]
)
def test_generators_that_the_user_names_are_replayed(generator: Any) -> None:
    def draw() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return float(generator.random())

    passes = ExtraPasses(nn.Linear(1, 1), generators=[generator])
    with passes.clean():
        first = draw()
    with passes.perturbed():
        assert draw() == first
    assert draw() != first


def test_what_is_no_generator_is_refused() -> None:
    with pytest.raises(TypeError, match="generators must be of torch, numpy or Python's random, got int"):
        ExtraPasses(nn.Linear(1, 1), generators=[3])
    net = Tiny()
    amp = AMP(net.parameters(), 0.1)
    with pytest.raises(TypeError, match="generators must be of torch, numpy or Python's random, got str"):
        attach(amp, net, generators=["numpy"])
    attach(amp, net)  # nothing of the attempt is left


# --- state that cannot be written


@pytest.mark.parametrize("kind", ["expanded", "inference", "conjugated", "nested"])
def test_buffers_that_cannot_be_written_are_left_alone(kind: str) -> None:
    module = Tiny()
    if kind == "expanded":
        module.register_buffer("constant", torch.ones(1).expand(4))
    elif kind == "conjugated":
        module.register_buffer("constant", torch.ones(4, dtype=torch.complex64).conj())
    elif kind == "nested":
        module.register_buffer("constant", torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged))
    else:
        with torch.inference_mode():
            module.register_buffer("constant", torch.ones(4))
    optimizer = AMP(module.parameters(), 0.1)
    attach(optimizer, module)
    before = [p.clone() for p in module.parameters()]
    module(*tiny_batches(1)[0]).backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_a_backbone_larger_than_what_is_trained_is_not_copied() -> None:
    backbone = nn.Linear(64, 64).requires_grad_(False)
    module = nn.Sequential(backbone, nn.Linear(64, 2))
    passes = ExtraPasses(module)
    with passes.clean():
        version = backbone.weight._version
    with passes.perturbed():
        pass
    assert backbone.weight._version == version


class Follows(Tiny):
    """Frozen parameters, larger than the trained ones, that every pass moves by 1, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.key = way, nn.Sequential(nn.Linear(9, 9)).double().requires_grad_(False)

    @torch.no_grad()
    def forward_key(self) -> None:
        for p in self.key.parameters():
            if self.way == "in place":
                p.add_(1)
            elif self.way == "data in place":
                p.data.add_(1)
            else:
                p.data = p.data + 1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.forward_key()
        return super().forward(x, y) * self.key[0].bias.sum()


@pytest.mark.parametrize("inner_iter", [1, 2])
@pytest.mark.parametrize("way", ["in place", "data in place", "new data"])
def test_a_large_momentum_encoder_is_moved_once_a_step_and_told(way: str, inner_iter: int) -> None:
    net = Follows(way)
    amp, start = AMP(net.parameters(), 0.1, inner_iter=inner_iter), [p.clone() for p in net.key.parameters()]
    attach(amp, net)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for k, batch in enumerate(tiny_batches(4), 1):
            net(*batch).backward()
            amp.step()
            amp.zero_grad()
            for p, q in zip(net.key.parameters(), start, strict=True):
                torch.testing.assert_close(p.data, q + k)
    (one,) = told(record, "key.0.weight (and 1 more) of Follows is frozen, but a pass moves it")
    assert one.filename == __file__


def test_a_large_momentum_encoder_that_starts_as_the_trained_weights_is_right_from_the_second_step_on() -> None:
    """In the first pass the mean of two equal weights is written through `.data`, which leaves no trace at all."""

    class Net(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.ModuleList(copy.deepcopy(self.first) for _ in range(4)).requires_grad_(False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for key in self.keys:
                for k, q in zip(key.parameters(), self.first.parameters(), strict=True):
                    k.data.lerp_(q.data, 0.5)
            return super().forward(x, y)

    net = Net()
    amp = AMP(net.parameters(), 0.1)
    attach(amp, net)
    for step, batch in enumerate(tiny_batches(4)):
        expected = [
            [k.lerp(q, 0.5) for k, q in zip(key.parameters(), net.first.parameters(), strict=False)] for key in net.keys
        ]
        net(*batch).backward()
        amp.step()
        amp.zero_grad()
        if step:
            torch.testing.assert_close([list(key.parameters()) for key in net.keys], expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("begins", [2, 3, 4, 9])
def test_state_that_begins_to_change_later_is_replayed_from_the_next_look_on_and_told(begins: int) -> None:
    class Net(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()
            self.part.total = torch.zeros(())  # type: ignore[assignment]
            self.begun = False

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if self.begun:
                self.part.total = self.part.total + 1
            return super().forward(x, y)

    net, totals = Net(), []
    amp = AMP(net.parameters(), 0.1)
    attach(amp, net)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for k, batch in enumerate(tiny_batches(20), 1):
            net.begun = k >= begins
            before = float(net.part.total)  # type: ignore[arg-type]
            net(*batch).backward()
            amp.step()
            amp.zero_grad()
            totals.append(float(net.part.total) - before)  # type: ignore[arg-type]
    look = next(n for n in (1, 2, 4, 8, 16) if n >= begins)
    assert totals == [0] * (begins - 1) + [2] * (look - begins) + [1] * (21 - look)
    words = "part.total of Net changes in a pass, which is seen only now"
    assert len(told(record, words)) == (look > 2)


@pytest.mark.parametrize("cleared", ["never", "by the loop", "by the module"])
def test_a_list_of_tensors_with_graphs_that_every_pass_makes_longer_is_told(cleared: str) -> None:
    class Net(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[Tensor] = []

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if cleared == "by the module":
                self.losses.clear()
            loss = super().forward(x, y)
            self.losses.append(loss)
            return loss

    net = Net()
    amp = AMP(net.parameters(), 0.1)
    attach(amp, net)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for batch in tiny_batches(5):
            net(*batch).backward()
            amp.step()
            amp.zero_grad()
            if cleared == "by the loop":
                net.losses.clear()
    assert len(told(record, "losses of Net grows in every pass of a step")) == (cleared != "by the module")


# --- gradients of others


def others_by_attach(net: Tiny, amp: AMP) -> Callable[[Any], None]:
    attach(amp, net)
    return lambda batch: net(*batch).backward()


def others_by_amp_backward(net: Tiny, amp: AMP) -> Callable[[Any], None]:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, amp)
    return lambda batch: amp_backward(accelerator, model, optimizer, lambda b: model(*b), [batch]) and None


@pytest.mark.parametrize("door", [others_by_attach, others_by_amp_backward])
@pytest.mark.parametrize("inner_iter", [1, 2])
def test_what_others_train_has_the_gradient_of_the_descent_alone(door: Any, inner_iter: int) -> None:
    net, (batch,) = Tiny(), tiny_batches(1)
    amp = AMP(net.last.parameters(), 0.1, inner_iter=inner_iter)
    twin = copy.deepcopy(net)
    by_hand = AMP(twin.last.parameters(), 0.1, inner_iter=inner_iter)
    for _ in by_hand.ascent_passes():
        twin(*batch).backward()
        twin.first.zero_grad()
    twin(*batch).backward()
    door(net, amp)(batch)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0.0)


def test_gradients_from_before_the_step_are_not_lost_with_attach() -> None:
    net, (batch,) = Tiny(), tiny_batches(1)
    amp = AMP(net.last.parameters(), 0.1)
    attach(amp, net)
    held = net.first.weight.grad = torch.ones_like(net.first.weight)
    net(*batch).backward()
    assert net.first.weight.grad is held
    assert not torch.equal(held, torch.ones_like(held)), "the descent's gradient was added"


# --- nothing silent


def test_gradients_that_a_closure_does_not_clear_are_told_once() -> None:
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step(closure)
    (one,) = told(record, "found gradients from before, and the closure does not clear them")
    assert one.filename == __file__


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("door", ["closure", "passes"])
def test_a_loop_that_never_sees_delta_is_told(door: str, seen: bool) -> None:
    """The optimizer has copies of the weights, as master copies of 16-bit weights are."""
    net = Tiny()
    own = list(net.parameters()) if seen else [p.detach().clone().requires_grad_() for p in net.parameters()]
    optimizer = AMP(own, 0.1)

    def closure(batch: Any) -> Tensor:
        net.zero_grad()
        loss: Tensor = net(*batch)
        loss.backward()
        for copied, p in zip(own, net.parameters(), strict=True):
            copied.grad = p.grad
        return loss

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for batch in tiny_batches(3):
            if door == "closure":
                optimizer.step(lambda batch=batch: closure(batch))
            else:
                for _ in optimizer.ascent_passes():
                    closure(batch)
                closure(batch)
                torch.nn.utils.clip_grad_norm_(own, 0.01)
                optimizer.step()
            optimizer.zero_grad()
    assert len(told(record, "the loop does not see the perturbation")) == (0 if seen else 1)


@pytest.mark.parametrize("outside", [lambda loss: -loss, lambda loss: (loss - 9.0).abs() + 9.0])
def test_a_loss_that_is_reversed_outside_the_module_is_an_error(outside: Loss) -> None:
    net, (batch,) = Tiny(), tiny_batches(1)
    optimizer = AMP(net.parameters(), 0.1)
    attach(optimizer, net)
    before = [p.clone() for p in net.parameters()]
    outside(net(*batch)).backward()
    with pytest.raises(RuntimeError, match="multiplied by a negative number before backward"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_loss_that_is_reversed_later_is_an_error_one_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on the host reads what has arrived: it does not wait for the factor of the same step."""
    made: list[int] = []
    read: list[tuple[int, int]] = []

    class Noted(AsyncScalar):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            self.step = len(made)
            made.append(self.step)

        def value(self) -> Any:
            read.append((self.step, len(made) - 1))
            return super().value()

    monkeypatch.setattr(perturbed_backward, "AsyncScalar", Noted)
    net = Tiny()
    optimizer = AMP(net.parameters(), 0.1)
    attach(optimizer, net)
    for i, batch in enumerate(tiny_batches(4)):
        optimizer.zero_grad()
        (net(*batch) * (-1.0 if i == 2 else 1.0)).backward()
        if i < 3:
            optimizer.step()
    with pytest.raises(RuntimeError, match="multiplied by a negative number before backward"):
        optimizer.step()
    assert read == [(0, 0), (0, 1), (1, 2), (2, 3)]


def test_a_positive_factor_is_no_error() -> None:
    net, (batch,) = Tiny(), tiny_batches(1)
    optimizer = AMP(net.parameters(), 0.1)
    attach(optimizer, net)
    (3 * net(*batch)).backward()
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clears", ["optimizer", "model"])
def test_a_step_that_the_scaler_skips_leaves_nothing_for_the_next(clears: str, set_to_none: bool) -> None:
    good = tiny_batches(3)
    bad = (torch.full((4, 4), torch.inf).double(), good[0][1])
    nets = [Tiny(), Tiny()]
    for net, data in zip(nets, ([good[0], bad, *good[1:]], good), strict=True):
        optimizer = AMP(net.parameters(), 0.1)
        attach(optimizer, net)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for batch in data:
            (net if clears == "model" else optimizer).zero_grad(set_to_none=set_to_none)
            scaler.scale(net(*batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.skipped_steps == 0
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0.0)


@pytest.mark.usefixtures("process_group")
def test_frozen_parameters_may_be_sharded() -> None:
    nets = [Tiny(), Tiny()]
    for net in nets:
        net.first.weight.requires_grad_(False)
    fully_shard(nets[1], mesh=init_device_mesh("cpu", (1,)))
    for net in nets:
        optimizer = AMP([p for p in net.parameters() if p.requires_grad], 0.1)
        attach(optimizer, net)
        for batch in tiny_batches(3):
            net(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert isinstance(nets[1].first.weight, DTensor)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q.full_tensor(), rtol=1e-12, atol=0.0)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("process_group")
def test_zero_redundancy_around_amp_is_refused_and_inside_it_works() -> None:
    net, (batch,) = Tiny(), tiny_batches(1)
    with pytest.raises(ValueError, match=r"put it inside: AMP\(params, base_optimizer=lambda"):
        ZeroRedundancyOptimizer(net.parameters(), optimizer_class=AMP, lr=0.1)
    zero = lambda params, **kwargs: ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.SGD, **kwargs)  # noqa: E731
    optimizer = AMP(net.parameters(), 0.1, base_optimizer=zero)
    attach(optimizer, net)
    net(*batch).backward()
    optimizer.step()


def test_base_optimizers_that_cannot_be_driven_are_refused_when_made() -> None:
    class Locked(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            self.inside, self.defaults = torch.optim.SGD(params, lr), {"lr": lr}

        @property
        def param_groups(self) -> Any:
            return self.inside.param_groups

        def step(self, closure: Any = None) -> None:
            self.inside.step()

    class Second(torch.optim.SGD):
        is_second_order = True

    with pytest.raises(ValueError, match="Locked does not let its param_groups be set"):
        AMP(nn.Linear(1, 1).parameters(), 0.1, base_optimizer=Locked)
    with pytest.raises(ValueError, match="Second differentiates the gradient, for which AMP keeps no graph"):
        AMP(nn.Linear(1, 1).parameters(), 0.1, base_optimizer=Second)


def test_a_checkpoint_with_other_hyper_parameters_says_which_win() -> None:
    params = [nn.Parameter(torch.ones(2))]
    saved = AMP(params, 0.1, epsilon=0.5, inner_lr=1.0).state_dict()
    now = AMP(params, 0.1, epsilon=0.2, inner_lr=1.0, ascent="every(2)")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        now.load_state_dict(saved)
    assert len(told(record, "the checkpoint's epsilon=0.5 replaces 0.2")) == 1
    assert not told(record, "inner_lr")
    assert len(told(record, "another ascent policy than 'every(2)'")) == 1
    assert record[0].filename == __file__
    assert now.param_groups[0]["epsilon"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AMP(params, 0.1, epsilon=0.5).load_state_dict(saved)
        AMP(params, 0.1, epsilon=0.2).load_state_dict(torch.optim.SGD(params, 0.1).state_dict())


def test_ascents_that_are_not_finite_are_told_once_at_the_users_line_and_counted() -> None:
    net, (batch,) = Tiny(), tiny_batches(1)
    bad = (torch.full((4, 4), torch.nan).double(), batch[1])
    optimizer = AMP(net.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            for _ in optimizer.ascent_passes():
                net(*bad).backward()
            net(*bad).backward()
            optimizer.step()
            optimizer.zero_grad()
    (one,) = told(record, "NaN or infinite")
    assert (one.filename, optimizer.skipped_steps) == (__file__, 3)


def test_criterion_state_is_replayed_where_it_is_in_the_module() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            self.seen += 1
            return F.cross_entropy(outputs, y) / self.seen.clone()

    criterion = Criterion()
    module = LossModule(nn.Linear(4, 3).double(), criterion)
    optimizer = AMP(module.parameters(), 0.1)
    attach(optimizer, module)
    for k, batch in enumerate(tiny_batches(3), 1):
        module(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        assert criterion.seen == k


# --- the user's own step of a Trainer


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(4, generator=generator).double(), "labels": torch.tensor(index % 3)}


class Returns(nn.Module):
    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x, labels)}


class InOrder(AMPTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def mixed(inputs: dict[str, Any]) -> dict[str, Any]:
    share = float(np.random.random())
    return {**inputs, "x": share * inputs["x"] + (1 - share) * inputs["x"].flip(0)}


class MixesInItsStep(InOrder):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return super().training_step(model, mixed(inputs), num_items_in_batch)


class MixesInPlace(InOrder):
    """Changes the dictionary that the loader has made."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        inputs.update(mixed(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


class MixesInItsLoss(InOrder):
    """Everything within the pass, as the Trainer's documentation recommends."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, mixed(inputs), *args, **kwargs)


class AddsALoss(InOrder):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        penalty = 0.1 * sum(p.square().sum() for p in model.parameters()) / self.current_gradient_accumulation_steps
        penalty.backward()
        return loss + penalty.detach()


class AddsInItsLoss(InOrder):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + 0.1 * sum(p.square().sum() for p in model.parameters())


class PreparesDifferently(InOrder):
    """Counts, and prepares each micro-batch by the count, as trainers that generate do."""

    prepared = 0

    def _prepare_inputs(self, inputs: Any) -> Any:
        self.prepared += 1
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "x": inputs["x"] * (1 + 0.1 * self.prepared)}


class PreparesSubclass(PreparesDifferently):
    """Nothing of its own: what is inherited counts."""


class PreparedByTheLoader(Rows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "x": row["x"] * (1 + 0.1 * (index // 4 + 1))}


def trained_by(kind: type[InOrder], folder: Path, data: Any = None, *, accumulation: int = 2, **kwargs: Any) -> InOrder:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "optim_args": "momentum=0.0,nesterov=False",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    trainer = kind(model=Returns(), args=AMPTrainingArguments(**{**settings, **kwargs}), train_dataset=data or Rows())
    np.random.seed(3)
    trainer.train()
    return trainer


@pytest.mark.parametrize("inner_iter", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("own", "within"),
    [(MixesInItsStep, MixesInItsLoss), (MixesInPlace, MixesInItsLoss), (AddsALoss, AddsInItsLoss)],
)
def test_a_step_of_a_subclass_acts_in_every_pass(
    own: type[InOrder], within: type[InOrder], accumulation: int, inner_iter: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"accumulation": accumulation, "amp_inner_iter": inner_iter}
    a, b = (trained_by(kind, tmp_path, **settings) for kind in (own, within))
    plain = trained_by(InOrder, tmp_path, **settings)
    for p, q, r in zip(a.model.parameters(), b.model.parameters(), plain.model.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(p, r, rtol=1e-4)


@pytest.mark.parametrize("kind", [PreparesDifferently, PreparesSubclass])
@pytest.mark.parametrize("inner_iter", [1, 2])
def test_inputs_are_prepared_once_for_all_passes(
    kind: type[PreparesDifferently], inner_iter: int, tmp_path: Path
) -> None:
    a = trained_by(kind, tmp_path, amp_inner_iter=inner_iter)
    b = trained_by(InOrder, tmp_path, PreparedByTheLoader(), amp_inner_iter=inner_iter)
    assert isinstance(a, PreparesDifferently)
    assert a.prepared == 6, "once for each micro-batch"
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_model_that_changes_its_batch_is_refused_by_the_trainer_too(tmp_path: Path) -> None:
    class Changes(InOrder):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs["x"].mul_(0.5)
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(RuntimeError, match="Changes or its model changes a batch in place"):
        trained_by(Changes, tmp_path)
