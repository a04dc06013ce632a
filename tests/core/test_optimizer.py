from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from problems import SGD_ARGS, assert_same_parameters, closure_for, parameters_of, small_batches, small_net, train
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, attach

# --- the released interface


def test_a_script_for_the_released_class_runs_unchanged() -> None:
    """AMP(params, lr, epsilon, inner_lr, inner_iter, base_optimizer, **kwargs); step returns (outputs, loss)."""
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1, 0.5, 1, 1, torch.optim.SGD, momentum=0.9, weight_decay=1e-4, nesterov=True)
    optimizer = AMP(model.parameters(), lr=0.1, epsilon=0.5, inner_lr=1, inner_iter=1, momentum=0.9)
    expected = F.cross_entropy(copy.deepcopy(model)(batch[0]), batch[1])
    outputs, loss = optimizer.step(closure_for(optimizer, model, batch))
    assert outputs.shape == (8, 4)
    assert torch.equal(loss, expected), "the loss of the clean pass"
    assert not outputs.requires_grad
    assert not loss.requires_grad


def test_a_closure_may_return_the_loss_alone_or_structures() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    inner = closure_for(optimizer, model, batch)
    assert isinstance(optimizer.step(lambda: inner()[1]), Tensor)
    result = optimizer.step(lambda: {"all": list(inner())})
    assert not result["all"][0].requires_grad


@pytest.mark.parametrize("inner_iter", [0, 1, 3])
def test_the_closure_runs_inner_iter_plus_one_times(inner_iter: int) -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1, inner_iter=inner_iter)
    inner, calls = closure_for(optimizer, model, batch), []

    def closure() -> Any:
        calls.append(optimizer.perturbed)
        return inner()

    optimizer.step(closure)
    assert calls == [False] + [True] * inner_iter


# --- exactly the base optimizer


@pytest.mark.parametrize("off", [{"epsilon": 0.0}, {"inner_iter": 0}, {"inner_lr": 0.0}])
def test_without_perturbation_it_is_the_base_optimizer_bit_for_bit(off: dict[str, Any]) -> None:
    a, b = small_net(), small_net()
    train(AMP(a.parameters(), **SGD_ARGS, **off), a, small_batches(5))
    train(torch.optim.SGD(b.parameters(), **SGD_ARGS), b, small_batches(5))
    assert_same_parameters(a, b)


def test_a_group_with_epsilon_zero_stays_in_place_during_the_descent_pass() -> None:
    model, batch = small_net(), small_batches(1)[0]
    groups = [
        {"params": model[0].parameters(), "epsilon": 0.0},
        {"params": model[5].parameters(), "inner_lr": 0.3},
    ]
    optimizer = AMP(groups, 0.1, 0.5)
    assert [g["epsilon"] for g in optimizer.param_groups] == [0.0, 0.5]
    assert [g["inner_lr"] for g in optimizer.param_groups] == [1.0, 0.3]
    before, seen = parameters_of(model), []
    inner = closure_for(optimizer, model, batch)

    def closure() -> Any:
        seen.append(parameters_of(model))
        return inner()

    optimizer.step(closure)
    assert torch.equal(seen[1]["0.weight"], before["0.weight"])
    assert not torch.equal(seen[1]["5.weight"], before["5.weight"])


# --- groups and parameters of every kind


def test_unknown_group_keys_survive_steps_and_loading() -> None:
    model = small_net()
    optimizer = AMP([{"params": model.parameters(), "lr_scale": 0.3, "use_fallback": True}], 0.1)
    train(optimizer, model, small_batches(1))
    other = AMP([{"params": small_net().parameters()}], 0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr_scale"] == 0.3
    assert other.param_groups[0]["use_fallback"] is True


def test_frozen_unused_tied_scalar_complex_and_an_empty_group() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.unused = nn.Parameter(torch.ones(3))
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.wave = nn.Parameter(torch.tensor([1 + 2j]))
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return (self.b(self.a(x)) * self.scale * self.frozen).sum() + self.wave.abs().sum()

    model, seen = Odd(), []
    before = parameters_of(model)
    optimizer = AMP([{"params": []}, {"params": list(model.parameters())}], 0.1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(parameters_of(model))
        loss = model(torch.ones(2, 3))
        loss.backward()
        return loss

    optimizer.step(closure)
    delta = {name: (seen[1][name] - before[name]).abs().norm().item() for name in before}
    assert delta["frozen"] == delta["unused"] == 0.0
    assert all(0.0 < delta[name] <= 0.5 + 1e-6 for name in ("scale", "wave", "a.weight"))
    assert torch.equal(model.unused, before["unused"])
    assert not torch.equal(model.wave, before["wave"])


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_a_gradient_in_only_one_of_the_passes(used: tuple[bool, bool]) -> None:
    """lr = 0: whatever the passes saw, the weights must end where they began."""
    always, sometimes = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AMP([always, sometimes], 0.0, 0.5, inner_iter=1)
    calls: list[int] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (always**2).sum() + ((sometimes**2).sum() if used[len(calls)] else 0.0)
        calls.append(1)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert always.tolist() == sometimes.tolist() == [1.0, 1.0]


def test_sparse_gradients_are_refused_and_nothing_moves() -> None:
    table, dense = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    before = table.weight.detach().clone()
    optimizer = AMP([dense, *table.parameters()], 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (table(torch.tensor([1])) * dense).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter of shape \(4, 2\)\)"):
        optimizer.step(closure)
    assert torch.equal(table.weight, before)
    assert dense.tolist() == [1.0, 1.0]


def test_add_param_group() -> None:
    model = small_net()
    optimizer = AMP(model[0].parameters(), 0.1, 0.4, momentum=0.9)
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.01, "epsilon": 0.2})
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
    assert [(g["lr"], g["epsilon"], g["inner_lr"]) for g in optimizer.param_groups] == [
        (0.1, 0.4, 1),
        (0.01, 0.2, 1),
    ]
    before = parameters_of(model)
    train(optimizer, model, small_batches(1))
    assert not torch.equal(model[5].weight, before["5.weight"])
    with pytest.raises(ValueError, match="epsilon must be a finite number >= 0, got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "epsilon": -1})
    assert len(optimizer.param_groups) == 2


# --- the weights are clean outside a step, whatever happens


@pytest.mark.parametrize("inner_iter", [1, 3])
@pytest.mark.parametrize("failing_call", [0, 1, 2, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_any_pass_leaves_the_weights_as_they_were(
    inner_iter: int, failing_call: int, error: type[BaseException]
) -> None:
    model, batches = small_net(), small_batches(3)
    optimizer = AMP(model.parameters(), **SGD_ARGS, inner_iter=inner_iter)
    train(optimizer, model, batches[:1])
    before, state = parameters_of(model), copy.deepcopy(optimizer.state_dict())
    inner, calls = closure_for(optimizer, model, batches[1]), []

    def closure() -> Any:
        calls.append(1)
        result = inner()
        if len(calls) == failing_call + 1:
            raise error("in the closure")
        return result

    if failing_call <= inner_iter:
        with pytest.raises(error):
            optimizer.step(closure)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert str(optimizer.state_dict()) == str(state)
    twin = copy.deepcopy(model)
    restarted = AMP(twin.parameters(), **SGD_ARGS, inner_iter=inner_iter)
    restarted.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, batches[2:])
    train(restarted, twin, batches[2:])
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_calls", [{0}, {0, 1}])
def test_a_non_finite_ascent_skips_the_step_and_says_so(bad: float, bad_calls: set[int]) -> None:
    model, batches = small_net(), small_batches(3)
    optimizer = AMP(model.parameters(), **SGD_ARGS)
    train(optimizer, model, batches[:1])
    before, state = parameters_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    calls: list[int] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batches[1][0]), batches[1][1]) * (bad if len(calls) in bad_calls else 1.0)
        calls.append(1)
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="ascent gradient had NaN or infinite entries"):
        optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for index, buffers in optimizer.state_dict()["state"].items():
        assert torch.equal(buffers["momentum_buffer"], state[index]["momentum_buffer"])
    train(optimizer, model, batches[2:])
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_accumulated_before_the_step_take_part_in_the_descent_only() -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AMP([p], 0.1, epsilon=10.0, inner_lr=0.5)
    (3 * p).sum().backward()

    def accumulating() -> Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer.step(accumulating)
    delta = 0.5 * 2 * 1.0  # inner_lr times the gradient of p^2 at 1
    assert p.item() == pytest.approx(1.0 - 0.1 * (3 + 2 * (1.0 + delta)))


# --- the two passes in the caller's own loop


def test_ascend_and_step_equal_the_closure() -> None:
    a, b, batches = small_net(), small_net(), small_batches(4)
    closed = AMP(a.parameters(), **SGD_ARGS, inner_iter=2)
    train(closed, a, batches)
    opened = AMP(b.parameters(), **SGD_ARGS, inner_iter=2)
    for x, y in batches:
        for _ in range(2):
            F.cross_entropy(b(x), y).backward()
            opened.ascend()
        F.cross_entropy(b(x), y).backward()
        opened.step()
        opened.zero_grad()
    assert_same_parameters(a, b)


def test_the_gradient_scale_is_divided_out_of_the_ascent() -> None:
    """AMP does not normalise, so a scaled loss must not mean a longer step."""
    a, b, (x, y) = small_net(), small_net(), small_batches(1)[0]
    plain, scaled = AMP(a.parameters(), 0.1, 100.0), AMP(b.parameters(), 0.1, 100.0)
    F.cross_entropy(a(x), y).backward()
    plain.ascend()
    (F.cross_entropy(b(x), y) * 1024.0).backward()
    scaled.ascend(grad_scale=torch.tensor(1024.0))
    assert_same_parameters(a, b)


def test_a_step_without_ascent_is_an_error_that_names_the_ways_out() -> None:
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    before = parameters_of(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"without the perturbation.*step\(closure\).*ascend\(\).*AMPTrainer"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_too_few_ascents_are_an_error() -> None:
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1, inner_iter=2)
    F.cross_entropy(model(x), y).backward()
    optimizer.ascend()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"needs 2 ascent step\(s\) before it, got 1"):
        optimizer.step()


def test_a_second_step_needs_a_second_ascent() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    optimizer.step(closure_for(optimizer, model, batch))
    with pytest.raises(RuntimeError, match=r"got 0"):
        optimizer.step()


def test_with_lr_zero_a_bare_step_builds_the_state() -> None:
    """As torch.distributed.checkpoint does before it loads one."""
    p = nn.Parameter(torch.ones(2))
    optimizer = AMP([p], 0.0, momentum=0.9)
    p.grad = torch.zeros(2)
    optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    assert "momentum_buffer" in optimizer.state[p]


def test_ascend_without_gradients_and_closure_after_ascend_are_errors() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="found no gradient"):
        optimizer.ascend()
    closure_for(optimizer, model, batch)()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match="after ascend"):
        optimizer.step(closure_for(optimizer, model, batch))
    optimizer.restore()
    optimizer.step(closure_for(optimizer, model, batch))


def test_restore_drops_an_unfinished_step() -> None:
    model, batch = small_net(), small_batches(1)[0]
    before = parameters_of(model)
    optimizer = AMP(model.parameters(), 0.1)
    for _ in range(2):
        closure_for(optimizer, model, batch)()
        optimizer.ascend()
        assert optimizer.perturbed
        optimizer.restore()
        assert not optimizer.perturbed
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    closure_for(optimizer, model, batch)()
    optimizer.ascend()
    closure_for(optimizer, model, batch)()
    optimizer.step()


# --- further cases


@pytest.mark.parametrize("off", [{"epsilon": 0.0}, {"inner_iter": 0}, {"inner_lr": 0.0}])
def test_without_perturbation_the_closure_runs_once(off: dict[str, Any]) -> None:
    model, batch, calls = small_net(), small_batches(1)[0], []
    optimizer = AMP(model.parameters(), 0.1, **off)
    inner = closure_for(optimizer, model, batch)
    optimizer.step(lambda: (calls.append(1), inner())[1])
    assert len(calls) == 1


def test_gradients_accumulated_before_stay_out_of_every_ascent() -> None:
    """From p = 1 with 0.5 * d(p^2)/dp: to 2, then to 4; the descent has 3 from before and 8 from there."""
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AMP([p], 0.1, epsilon=10.0, inner_lr=0.5, inner_iter=2)
    (3 * p).sum().backward()

    def accumulating() -> Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer.step(accumulating)
    assert p.item() == pytest.approx(1.0 - 0.1 * (3 + 8))


def test_gradients_that_the_closure_clears_are_freed_at_once() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    inner = closure_for(optimizer, model, batch)
    inner()
    old, alive = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None], []
    model[0].register_forward_pre_hook(lambda *_: alive.append(sum(r() is not None for r in old)))
    optimizer.step(inner)
    assert alive == [0, 0]


def test_gradients_from_before_are_not_held_after_the_step() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = AMP([p], 0.1)
    (3 * p).sum().backward()
    old = weakref.ref(p.grad)
    optimizer.step(lambda: (p**2).sum().backward())
    p.grad = None
    assert old() is None


def test_an_interrupted_step_does_not_count_as_an_ascent() -> None:
    model, batch, calls = small_net(), small_batches(1)[0], []
    optimizer = AMP(model.parameters(), 0.1)
    inner = closure_for(optimizer, model, batch)

    def fails_when_perturbed() -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return inner()

    with pytest.raises(MemoryError):
        optimizer.step(fails_when_perturbed)
    inner()
    with pytest.raises(RuntimeError, match="got 0"):
        optimizer.step()


def test_a_refused_ascent_puts_the_weights_back() -> None:
    """The second of two ascents finds an epsilon that a schedule has ruined."""
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1, inner_iter=2)
    before, backward = parameters_of(model), closure_for(optimizer, model, batch)
    backward()
    optimizer.ascend()
    backward()
    optimizer.param_groups[0]["epsilon"] = math.nan
    with pytest.raises(ValueError, match="epsilon"):
        optimizer.ascend()
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_skipped_step_does_not_stop_the_base_optimizer_when_epsilon_has_decayed_to_zero() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = AMP([p], 0.1)
    p.grad = torch.full((1,), math.nan)
    optimizer.ascend()
    p.grad = torch.ones(1)
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    optimizer.param_groups[0]["epsilon"] = 0.0
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.9)
    assert optimizer.skipped_steps == 1
    assert copy.deepcopy(optimizer).skipped_steps == 1


def test_a_bare_step_is_an_error_unless_every_lr_is_zero() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = AMP([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.1}], 0.1)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    with pytest.raises(RuntimeError, match="without the perturbation"):
        optimizer.step()
    assert b.item() == 1.0


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_the_scale_of_a_tensor_that_is_listed_twice_is_divided_out_once() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = AMP([{"params": [p, p]}], 0.1, epsilon=10.0)
    p.grad = torch.full((1,), 8.0)
    optimizer.ascend(grad_scale=4.0)
    assert p.item() == 2.0


@pytest.mark.parametrize("norm", ["tensor", "global"])
@pytest.mark.parametrize("epsilon", [0.01, 10.0])
@pytest.mark.parametrize("inner_iter", [1, 3])
def test_maximising_an_objective_is_minimising_its_negative(norm: Any, epsilon: float, inner_iter: int) -> None:
    weights = []
    for sign in (1.0, -1.0):
        p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = AMP([p], 0.1, epsilon, 0.3, inner_iter, norm=norm, maximize=sign < 0)
        for _ in range(3):
            for k in range(inner_iter + 1):
                (sign * (p**4).sum()).backward()
                optimizer.step() if k == inner_iter else optimizer.ascend()
            optimizer.zero_grad()
        weights.append(p.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("wrong", ["step too early", "closure after ascend"])
def test_a_refused_step_puts_the_weights_back(wrong: str) -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1, inner_iter=2)
    before, closure = parameters_of(model), closure_for(optimizer, model, batch)
    closure()
    optimizer.ascend()
    with pytest.raises(RuntimeError):
        optimizer.step(closure if wrong == "closure after ascend" else None)
    assert not optimizer.perturbed
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_ascent_dropped_by_restore_does_not_count() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    closure = closure_for(optimizer, model, batch)
    closure()
    optimizer.ascend()
    optimizer.restore()
    closure()  # at theta
    with pytest.raises(RuntimeError, match="got 0"):
        optimizer.step()


def test_parameters_that_are_pending_sums_are_refused_and_nothing_moves() -> None:
    """Sharded parameters, which are not, are tested in test_fsdp.py."""
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        terms = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Partial()])
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(terms)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = AMP(params, 0.1)
        with pytest.raises(RuntimeError, match="a parameter that is a pending sum"):
            optimizer.ascend()
        assert not optimizer.perturbed
        assert [params[0].tolist(), params[1].to_local().tolist()] == [[1.0] * 2, [1.0] * 4]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("returns", ["loss", "nothing"])
def test_a_closure_without_backward_is_an_error(returns: str) -> None:
    """The gradients that lie there are no reason to go on; Lightning's manual optimization passes such a closure."""
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    F.cross_entropy(model(x), y).backward()
    before = parameters_of(model)
    with (
        pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"),
        pytest.raises(RuntimeError, match=r"left no gradient: .* use amp_plugin\.attach"),
    ):
        optimizer.step(lambda: F.cross_entropy(model(x), y) if returns == "loss" else None)
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(model).items())


def test_a_step_without_any_gradient_is_as_harmless_as_the_base_optimizers() -> None:
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    before = parameters_of(model)
    with pytest.warns(RuntimeWarning, match="a pass left no gradient to ascend along"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert all(torch.equal(p, before[name]) for name, p in parameters_of(model).items())


@pytest.mark.parametrize("clear", [None, "zero"])
def test_an_optimizer_that_steps_inside_backward_is_refused(clear: str | None) -> None:
    """Its steps at theta + delta would be undone without a word."""
    model, (x, y) = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), lr=0.1)

    def step_now(p: Tensor) -> None:
        p.data.sub_(0.0)  # what the version counter cannot see
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        if clear == "zero":
            p.grad.zero_()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    with pytest.raises(RuntimeError, match="steps inside the backward pass cannot be used with AMP"):
        optimizer.step(closure_for(optimizer, model, (x, y)))
    assert not optimizer.perturbed


def test_weights_that_a_module_changes_itself_are_none_of_its_business() -> None:
    embedding = nn.Embedding(4, 3, max_norm=1.0)
    optimizer = AMP(embedding.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = embedding(torch.arange(4)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("door", ["closure", "closure that returns a number", "ascend", "attach"])
def test_a_loss_of_exactly_zero_is_a_loss_like_any_other(door: str) -> None:
    class Zero(nn.Module):
        """Its gradient is 2 + 2 p, whatever its value."""

        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self) -> Tensor:
            loss = (2 * self.p + self.p.square()).sum()
            return loss - loss.detach()

    module = Zero()
    optimizer = AMP(module.parameters(), 0.1, epsilon=0.5)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = module()
        loss.backward()
        return loss if door == "closure" else loss.item()

    if door.startswith("closure"):
        assert optimizer.step(closure) == 0.0
    elif door == "ascend":
        closure()
        optimizer.ascend()
        closure()
        optimizer.step()
    else:
        attach(optimizer, module)
        assert closure() == 0.0
        optimizer.step()
    assert module.p.item() == pytest.approx(-0.1 * (2 + 2 * 0.5))
    assert optimizer.skipped_steps == 0
