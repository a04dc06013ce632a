"""The forward door: a plain `loss.backward(); optimizer.step()` loop, against the closure door and the reference."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import (
    SGD_ARGS,
    InOneSlot,
    assert_same_parameters,
    closure_for,
    parameters_of,
    small_batches,
    small_net,
)
from reference import amp_trajectory
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from amp_plugin import AMP, ExtraPasses, LossModule, attach, detach

AMP_ARGS: dict[str, Any] = {"epsilon": 0.1, "inner_lr": 0.5, **SGD_ARGS}


def loss_module(seed: int = 0, **kwargs: Any) -> LossModule:
    return LossModule(small_net(seed=seed, **kwargs), F.cross_entropy)


def attached(seed: int = 0, **kwargs: Any) -> tuple[LossModule, AMP]:
    module = loss_module(seed)
    optimizer = AMP(module.parameters(), **{**AMP_ARGS, **kwargs})
    attach(optimizer, module)
    return module, optimizer


def plain_step(optimizer: torch.optim.Optimizer, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = module(*batch)["loss"]
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("inner_iter", [1, 3])
@pytest.mark.parametrize("policies", [("clean", "same"), ("all", "fresh")])
def test_it_is_the_closure_bit_for_bit(norm: Any, inner_iter: int, policies: tuple[Any, Any]) -> None:
    """With dropout and BatchNorm: weights, running statistics, momentum, logged loss, random numbers consumed."""
    a = small_net(dropout=0.3)
    b = LossModule(copy.deepcopy(a), F.cross_entropy)
    kwargs = {"norm": norm, "inner_iter": inner_iter, **AMP_ARGS}
    by_closure, plain = AMP(a.parameters(), **kwargs), AMP(b.parameters(), **kwargs)
    passes = ExtraPasses(a, batch_norm=policies[0], rng=policies[1])
    attachment = attach(plain, b, batch_norm=policies[0], rng=policies[1])
    for batch in small_batches(10):
        start = torch.get_rng_state()
        _, expected = by_closure.step(closure_for(by_closure, a, batch), passes=passes)
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        loss = plain_step(plain, b, batch)
        assert torch.equal(loss, expected)
        assert torch.equal(torch.get_rng_state(), end)
        assert plain.statistics() == by_closure.statistics()
        assert_same_parameters(a, b.model)
        assert attachment.amp_loss is not None
        assert attachment.loss is not None
        assert attachment.amp_loss > attachment.loss
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.model.buffers(), strict=True))
    for p, q in zip(a.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(by_closure.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])


class _InPlace(torch.autograd.Function):
    """Gives a loss in memory that the next pass uses again, as the graphs of `torch.compile` do."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, memory: Tensor) -> Tensor:
        ctx.mark_dirty(memory)
        return memory.copy_(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def test_the_loss_at_theta_outlives_the_memory_that_it_was_returned_in() -> None:
    memory = torch.zeros(())

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_net()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = _InPlace.apply(F.cross_entropy(self.model(x), y), memory.detach())
            return loss

    module, batch = Module(), small_batches(1)[0]
    expected = F.cross_entropy(copy.deepcopy(module.model)(batch[0]), batch[1])
    optimizer = AMP(module.parameters(), **AMP_ARGS)
    attach(optimizer, module)
    assert torch.equal(module(*batch), expected)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_trajectory_is_the_references(clip: float | None) -> None:
    module, batches = loss_module(dtype=torch.float64), small_batches(12, dtype=torch.float64)
    amp_args = {**AMP_ARGS, "lr": 0.01}
    steps = amp_trajectory(module.model, F.cross_entropy, batches, clip_norm=clip, **amp_args)
    optimizer = AMP(module.parameters(), **amp_args)
    attach(optimizer, module)
    for batch, step in zip(batches, steps, strict=True):
        optimizer.zero_grad()
        module(*batch)["loss"].backward()
        if clip is not None:
            assert nn.utils.clip_grad_norm_(module.parameters(), clip) > clip, "the clip must act, or it is not tested"
        optimizer.step()
        for name, p in module.model.named_parameters():
            torch.testing.assert_close(p.detach(), step.params[name], rtol=1e-10, atol=1e-12)


def test_each_micro_batch_is_perturbed_for_itself() -> None:
    """Gradients add up over micro-batches, and the ascent sees none of what the loop has accumulated."""
    (x, y), (u, v) = small_batches(2)
    module, optimizer = attached()
    for batch in ((x, y), (u, v)):
        module(*batch)["loss"].div(2).backward()
    accumulated = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    separate = []
    for batch in ((x, y), (u, v)):
        optimizer.zero_grad()
        module(*batch)["loss"].div(2).backward()
        separate.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
    for total, first, second in zip(accumulated, *separate, strict=True):
        assert torch.equal(total, first + second)


def test_the_weights_are_clean_outside_forward_and_backward() -> None:
    module, optimizer = attached()
    before, buffers = parameters_of(module), [b.clone() for b in module.buffers()]
    seen: dict[str, bool] = {}

    def look(stage: str) -> None:
        seen[stage] = all(torch.equal(p, before[n]) for n, p in module.named_parameters())

    handle = module.model[0].register_forward_hook(lambda *_: look("first ascent") if not seen else look("forward"))
    loss = module(*small_batches(1)[0])["loss"]
    handle.remove()
    look("between")
    module.model[0].weight.register_hook(lambda g: look("backward"))
    running = [b.clone() for b in module.buffers()]
    loss.backward()
    look("after")
    assert seen == {"first ascent": True, "forward": False, "between": True, "backward": False, "after": True}
    assert any(not torch.equal(a, b) for a, b in zip(running, buffers, strict=True)), "the clean pass counts"
    assert all(torch.equal(a, b) for a, b in zip(running, module.buffers(), strict=True)), "and only that one"
    assert not optimizer.perturbed


def test_a_module_may_return_its_loss_in_the_same_memory_in_every_pass() -> None:
    slot, (batch,) = torch.zeros(()), small_batches(1)
    values = []
    for criterion in (F.cross_entropy, lambda *args: InOneSlot.apply(F.cross_entropy(*args), slot)):
        module = LossModule(small_net(), criterion)
        optimizer = AMP(module.parameters(), **AMP_ARGS)
        attachment = attach(optimizer, module)
        loss = plain_step(optimizer, module, batch)
        assert attachment.loss is not None
        assert torch.equal(loss, attachment.loss)
        assert attachment.amp_loss is not None
        assert attachment.amp_loss > loss
        values.append([loss, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ArithmeticError("boom")


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_a_failure_in_any_pass_leaves_the_weights_clean_at_once(where: str, at_call: int) -> None:
    module, optimizer = attached(inner_iter=2)
    before, buffers = parameters_of(module), [b.clone() for b in module.buffers()]
    calls = 0

    def criterion(outputs: Tensor, targets: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls != at_call:
            return F.cross_entropy(outputs, targets)
        if where == "forward":
            raise ArithmeticError("boom")
        return F.cross_entropy(Boom.apply(outputs), targets) if where == "backward" else "no loss"

    module.criterion = criterion
    module.model[0].weight.grad = torch.ones_like(module.model[0].weight)
    with pytest.raises(TypeError if where == "loss" else ArithmeticError):
        module(*small_batches(1)[0])["loss"].backward()
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert torch.equal(module.model[0].weight.grad, torch.ones_like(module.model[0].weight))
    if at_call > 1 and where != "backward":
        assert any(not torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    with pytest.raises(RuntimeError, match="no gradient of the attached module"):
        optimizer.step()
    calls = 10  # and it goes on from there
    plain_step(optimizer, module, small_batches(1)[0])
    assert not optimizer.perturbed


def test_a_forward_without_backward_leaves_no_trace() -> None:
    module, optimizer = attached()
    before = parameters_of(module)
    module(*small_batches(1)[0])
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert all(p.grad is None for p in module.parameters())
    with pytest.raises(RuntimeError, match="would train without the perturbation"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_losses_with_a_backward_pass_each(order: tuple[int, int]) -> None:
    """Each loss's gradient is taken at its own perturbation, whatever was computed in between."""
    batches = small_batches(2)
    expected = []
    for batch in batches:
        module, _ = attached()
        module.eval().train()
        module(*batch)["loss"].backward()
        expected.append([p.grad.clone() for p in module.parameters()])
    module, _ = attached()
    losses = [module(*batch)["loss"] for batch in batches]
    for i in order:
        for p in module.parameters():
            p.grad = None
        losses[i].backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), expected[i], strict=True))


def test_two_losses_in_one_backward_pass_are_refused() -> None:
    module, optimizer = attached()
    before = parameters_of(module)
    first, second = (module(*batch)["loss"] for batch in small_batches(2))
    with pytest.raises(RuntimeError, match="two losses of an attached module in one backward pass"):
        (first + second).backward()
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_a_graph_recorded_at_theta_is_not_differentiated_at_the_perturbed_point() -> None:
    module, optimizer = attached()
    before = parameters_of(module)
    penalty = sum(p.square().sum() for p in module.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (module(*small_batches(1)[0])["loss"] + penalty).backward()
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    for p in module.parameters():
        p.grad = None
    sum(p.square().sum() for p in module.parameters()).backward()  # by itself it is at theta
    assert all(torch.equal(p.grad, 2 * p) for p in module.parameters())


def test_weights_that_change_between_forward_and_backward_are_noticed() -> None:
    module, optimizer = attached()
    loss = module(*small_batches(1)[0])["loss"]
    with torch.no_grad():
        module.model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weights have changed since"):
        loss.backward()
    assert not optimizer.perturbed


def test_a_retained_graph_can_be_differentiated_again() -> None:
    module, _ = attached()
    loss = module(*small_batches(1)[0])["loss"]
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in module.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(module.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autograd_grad_gives_the_same_gradient() -> None:
    (a, _), (b, _) = attached(), attached()
    batch = small_batches(1)[0]
    a(*batch)["loss"].backward()
    grads = torch.autograd.grad(b(*batch)["loss"], list(b.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(a.parameters(), grads, strict=True))


@pytest.mark.parametrize("off", ["eval", "no_grad", "epsilon"])
def test_without_perturbation_the_module_is_left_alone(off: str) -> None:
    module, optimizer = attached(epsilon=0.0 if off == "epsilon" else 0.1)
    twin = copy.deepcopy(module)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    module.model.register_forward_hook(count)
    if off == "eval":
        module.eval(), twin.eval()
    with torch.set_grad_enabled(off != "no_grad"):
        x, y = small_batches(1)[0]
        assert torch.equal(module(x, y)["loss"], twin(x, y)["loss"])
    assert calls == 1
    assert not optimizer.perturbed


def test_a_module_that_changes_its_input_is_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x.sub_(1.0) * self.weight).square().sum()

    module = InPlace()
    attach(AMP(module.parameters(), lr=0.1), module)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        module(torch.ones(3))


@pytest.mark.parametrize("inner_iter", [1, 2])
def test_the_gradient_of_an_input_is_that_of_the_descent_alone(inner_iter: int) -> None:
    """A leaf, and one that hangs on a graph of the loop's own, which the ascent's backward pass must not free."""
    (a, _), (b, _) = (attached(inner_iter=inner_iter) for _ in range(2))
    x, y = small_batches(1)[0]
    leaf = x.clone().requires_grad_()
    a(leaf, y)["loss"].backward()
    encoder = nn.Conv2d(3, 3, 1)
    nn.init.dirac_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    encoded = torch.tanh(encoder(torch.atanh(x.clamp(-0.9, 0.9))))
    loss = b(encoded, y)["loss"]
    assert encoder.weight.grad is None
    loss.backward()
    assert encoder.weight.grad is not None
    alone = x.clone().requires_grad_()
    c, _ = attached(inner_iter=inner_iter)
    (grad,) = torch.autograd.grad(c(alone, y)["loss"], alone)
    assert alone.grad is None
    assert torch.equal(leaf.grad, grad)


def test_arguments_keep_their_kind_and_need_not_be_tensors() -> None:
    seen: list[Any] = []

    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((args, kwargs))
            return (self.weight * args[0]["x"]).sum()

    Named = namedtuple("Named", ["loss", "logits"])

    class Batch(UserDict):  # type: ignore[type-arg]
        """As transformers' tokenizers return."""

    module = Echo()
    attach(AMP(module.parameters(), lr=0.1), module)
    x = torch.ones(3, requires_grad=True)
    args, kwargs = (Batch(x=x), [1, (x, "a")], Named(x, None)), {"n": 3, "nested": {"x": x}, "none": None}
    module(*args, **kwargs)
    assert len(seen) == 2
    for (batch, numbers, named), others in seen:
        assert type(batch) is Batch
        assert numbers[1][1] == "a"
        assert type(named) is Named
        assert others["n"] == 3
        assert all(torch.equal(t, x) for t in (batch["x"], numbers[1][0], named.loss, others["nested"]["x"]))
        assert all(t.requires_grad for t in (batch["x"], numbers[1][0], named.loss, others["nested"]["x"]))
    assert seen[1][0][0] is args[0], "the last pass is the loop's own"


def test_a_batch_that_can_be_read_only_once_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, micro_batches: Any) -> Tensor:
            penalty: Tensor = self.weight.square().sum()
            return sum(((self.weight * x).sum() for x in micro_batches), penalty)

    module = Reads()
    attach(AMP(module.parameters(), lr=0.1), module)
    module([torch.ones(3)]).backward()
    with pytest.raises(TypeError, match="a list_iterator can be read only once"):
        module(iter([torch.ones(3)]))


@pytest.mark.parametrize("how", ["another group", "other parameters in the module"])
def test_parameters_that_no_longer_belong_together_are_refused(how: str) -> None:
    module, optimizer = attached()
    if how == "another group":
        outside = nn.Parameter(torch.ones(()))
        optimizer.add_param_group({"params": [outside]})
        module.criterion = lambda outputs, targets: F.cross_entropy(outputs * outside, targets)
    else:
        module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    with pytest.raises(ValueError, match="are not in the module"):
        module(*small_batches(1)[0])


def test_a_module_may_change_its_own_weights_in_its_forward_pass() -> None:
    """`nn.Embedding(max_norm=...)` does, and here the same weights are used again."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(10, 4, max_norm=0.5)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(self.table(tokens), self.table.weight), tokens)

    tokens, (a, b) = torch.arange(6), (Tied(), Tied())
    one, two = (AMP(m.parameters(), **AMP_ARGS) for m in (a, b))
    attach(one, a)
    for _ in range(3):
        one.zero_grad()
        a(tokens).backward()
        one.step()

        def closure() -> Tensor:
            two.zero_grad()
            loss: Tensor = b(tokens)
            loss.backward()
            return loss

        two.step(closure)
    assert_same_parameters(a, b)


def test_a_second_derivative_is_refused() -> None:
    """The graph of the gradient is one at theta + delta, and the weights are theta by then."""
    module, optimizer = attached()
    before = parameters_of(module)
    loss = module(*small_batches(1)[0])["loss"]
    grads = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(g.square().sum() for g in grads).backward()
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_module_and_optimizer_are_freed_and_no_step_leaves_tensors_behind() -> None:
    batches, (module, optimizer) = small_batches(5), attached()
    plain_step(optimizer, module, batches[0])
    gc.collect()

    def alive() -> int:
        return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())

    before = alive()
    gc.disable()  # not even until the next collection
    try:
        for batch in batches:
            plain_step(optimizer, module, batch)
        assert alive() == before
    finally:
        gc.enable()
    refs = [weakref.ref(module), weakref.ref(optimizer), weakref.ref(module.model[0].weight)]
    detach(module)
    del module, optimizer
    assert [r() for r in refs] == [None] * 3, "after detach(), at once"
    module, optimizer = attached()
    plain_step(optimizer, module, small_batches(1)[0])
    refs = [weakref.ref(module), weakref.ref(optimizer), weakref.ref(module.model[0].weight)]
    del module, optimizer
    gc.collect()
    assert [r() for r in refs] == [None] * 3, "attached, as with any cycle"


def test_a_batch_that_the_module_takes_to_pieces() -> None:
    class Pops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, batch: dict[str, Tensor], *, extra: dict[str, Tensor]) -> Tensor:
            return (batch.pop("x") * self.weight * extra.pop("y")).sum()

    module = Pops()
    attach(AMP(module.parameters(), lr=0.1), module)
    module({"x": torch.ones(3)}, extra={"y": torch.ones(3)}).backward()


def test_what_attach_refuses() -> None:
    module, optimizer = attached()
    with pytest.raises(ValueError, match="this optimizer is attached"):
        attach(optimizer, module)
    with pytest.raises(ValueError, match="this module, or a part of it, is attached"):
        attach(AMP(module.parameters(), lr=0.1), module)
    with pytest.raises(ValueError, match="or a part of it, is attached"):
        attach(AMP(module.parameters(), lr=0.1), nn.Sequential(module))
    with pytest.raises(TypeError, match=r"needs amp_plugin\.AMP, got SGD"):
        attach(torch.optim.SGD(module.parameters(), lr=0.1), loss_module())
    with pytest.raises(ValueError, match=r"6 of the optimizer's parameters .* are not in the module"):
        attach(AMP(small_net().parameters(), lr=0.1), loss_module())
    with pytest.raises(ValueError, match="is not attached"):
        detach(module.model)
    with pytest.raises(RuntimeError, match="the attached module makes the ascent"):
        optimizer.ascend()
    free = small_net()
    with pytest.raises(ValueError, match="batch_norm must be one of"):
        attach(AMP(free.parameters(), lr=0.1), free, batch_norm="never")  # type: ignore[arg-type]


def test_detach_gives_module_and_optimizer_back() -> None:
    module, optimizer = attached()
    loss = module(*small_batches(1)[0])["loss"]
    detach(module)
    with pytest.raises(RuntimeError, match="between the forward and the backward"):
        loss.backward()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    optimizer.zero_grad()
    module(*small_batches(1)[0])["loss"].backward()
    with pytest.raises(RuntimeError, match="needs 1 ascent"):
        optimizer.step()
    train_by_closure = closure_for(optimizer, module.model, small_batches(1)[0])
    optimizer.step(train_by_closure)
    attach(optimizer, module)  # and again


def test_an_attached_module_in_another_ones_forward_pass_is_refused() -> None:
    inner, _ = attached()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = inner(x, y)["loss"]
            return loss * self.scale

    outer = Outer()
    optimizer = AMP(outer.parameters(), lr=0.1)
    attach(optimizer, outer)
    with pytest.raises(RuntimeError, match="in the forward pass of another one"):
        outer(*small_batches(1)[0])
    plain_step(AMP([nn.Parameter(torch.ones(()))], lr=0.0), inner, small_batches(1)[0])  # and nothing stays locked


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_module_is_not_attached(duplicate: Callable[[Any], Any]) -> None:
    module, optimizer = attached()
    twin = duplicate(module)
    before = parameters_of(twin)
    twin(*small_batches(1)[0])["loss"].backward()
    reference = loss_module()
    reference(*small_batches(1)[0])["loss"].backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(twin.parameters(), reference.parameters(), strict=True))
    assert all(torch.equal(p, before[n]) for n, p in twin.named_parameters())
    other = AMP(twin.parameters(), **AMP_ARGS)
    attach(other, twin)
    plain_step(other, twin, small_batches(1)[0])
    plain_step(optimizer, module, small_batches(1)[0])


def test_a_copy_of_the_optimizer_is_not_attached() -> None:
    _module, optimizer = attached()
    assert optimizer.attached
    assert not copy.deepcopy(optimizer).attached


def test_the_state_is_the_base_optimizers_and_resumes_bit_for_bit(tmp_path: Any) -> None:
    batches = small_batches(6)
    module, optimizer = attached()
    for batch in batches[:3]:
        plain_step(optimizer, module, batch)
    loss = module(*batches[3])["loss"]  # a checkpoint between forward and backward, even
    torch.save({"model": module.model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    del loss
    resumed, other = attached(seed=1)
    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.model.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    for batch in batches[3:]:
        plain_step(other, resumed, batch)
    straight, third = attached()
    for batch in batches:
        plain_step(third, straight, batch)
    assert_same_parameters(resumed, straight)


def test_averages_see_clean_weights() -> None:
    """EMA and SWA, updated between any two calls of the loop."""
    module, optimizer = attached()
    average = AveragedModel(module.model)
    expected = AveragedModel(loss_module().model)
    clean = loss_module().model
    for batch in small_batches(4):
        optimizer.zero_grad()
        loss = module(*batch)["loss"]
        average.update_parameters(module.model)
        clean.load_state_dict(module.model.state_dict())
        expected.update_parameters(clean)
        loss.backward()
        optimizer.step()
    assert_same_parameters(average.module, expected.module)


class Game(nn.Module):
    """One player's loss, which goes through both networks."""

    def __init__(self, generator: nn.Module, critic: nn.Module, sign: float) -> None:
        super().__init__()
        self.generator, self.critic, self.sign = generator, critic, sign

    def forward(self, noise: Tensor, real: Tensor) -> Tensor:
        fake = self.generator(noise)
        loss = F.softplus(self.sign * self.critic(fake)).mean()
        return loss if self.sign < 0 else loss + F.softplus(-self.critic(real)).mean()


def players() -> tuple[list[Game], list[AMP]]:
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    c = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizers = [AMP(m.parameters(), lr=0.1, epsilon=0.1, inner_lr=0.5, momentum=0.9) for m in (g, c)]
    return [Game(g, c, -1.0), Game(g, c, 1.0)], optimizers


def test_two_optimizers_on_two_modules_that_share_networks() -> None:
    """GAN-style: each player's perturbation moves its own weights only; compared with the closure door."""
    batches = [(torch.randn(8, 2).double(), torch.randn(8, 3).double()) for _ in range(5)]
    games, optimizers = players()
    for optimizer, game in zip(optimizers, games, strict=True):
        attach(optimizer, game)
    for batch in batches:
        for optimizer, game in zip(optimizers, games, strict=True):
            game.zero_grad()
            game(*batch).backward()
            optimizer.step()
    twins, by_closure = players()
    for batch in batches:
        for optimizer, game in zip(by_closure, twins, strict=True):

            def closure(game: Game = game, batch: Any = batch) -> Tensor:
                game.zero_grad()
                loss: Tensor = game(*batch)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same_parameters(games[0], twins[0])


def test_both_players_forward_passes_before_either_backward_pass() -> None:
    batch = torch.randn(8, 2).double(), torch.randn(8, 3).double()
    expected = []
    for i in range(2):
        games, optimizers = players()
        attach(optimizers[i], games[i])
        games[i](*batch).backward()
        expected.append([p.grad.clone() for p in games[i].parameters()])
    games, optimizers = players()
    for optimizer, game in zip(optimizers, games, strict=True):
        attach(optimizer, game)
    losses = [game(*batch) for game in games]
    for game, loss, grads in zip(games, losses, expected, strict=True):
        game.zero_grad()
        loss.backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(game.parameters(), grads, strict=True))


def test_a_closure_is_called_once() -> None:
    """As loops that always pass one do."""
    (a, one), (b, two) = attached(), attached()
    calls = 0
    for batch in small_batches(3):
        plain_step(one, a, batch)

        def closure(batch: Any = batch) -> Tensor:
            nonlocal calls
            calls += 1
            two.zero_grad()
            loss: Tensor = b(*batch)["loss"]
            loss.backward()
            return loss

        assert not two.step(closure).requires_grad
    assert calls == 3
    assert_same_parameters(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_ascent_skips_the_step_and_says_so(bad: float) -> None:
    module, optimizer = attached()
    batches = small_batches(2)
    plain_step(optimizer, module, batches[0])
    before = parameters_of(module)
    calls = 0

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(outputs, targets) * (bad if calls == 1 else 1.0)

    module.criterion = criterion
    optimizer.zero_grad()
    module(*batches[1])["loss"].backward()  # the first of two micro-batches
    module(*batches[0])["loss"].backward()
    with pytest.warns(RuntimeWarning, match="step was skipped"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert optimizer.skipped_steps == 1
    plain_step(optimizer, module, batches[1])
    assert not all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_autocast_does_not_hide_the_perturbation() -> None:
    """Both passes inside one autocast block: the cache of cast weights must not serve the perturbed pass."""
    (a, _), (b, _) = attached(), attached()
    batch = small_batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = a(*batch)["loss"]
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = b(*batch)["loss"]
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    plain = loss_module()
    with torch.autocast("cpu", torch.bfloat16):
        plain(*batch)["loss"].backward()
    assert any(not torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), plain.parameters(), strict=True))


def test_frozen_and_unused_parameters() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.frozen, self.unused = (nn.Parameter(torch.ones(3)) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.used * x * self.frozen).square().sum()

    module = Partly()
    optimizer = AMP(module.parameters(), lr=0.1, epsilon=0.1)
    attach(optimizer, module)
    module(torch.ones(3)).backward()
    optimizer.step()
    assert not torch.equal(module.used, torch.ones(3))
    assert torch.equal(module.frozen, torch.ones(3))
    assert torch.equal(module.unused, torch.ones(3))
    assert module.unused.grad is None
