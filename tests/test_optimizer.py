from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import closure_for, parameters_of, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from amp_plugin import AMP, ExtraPasses

SGD_ARGS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}


def train(optimizer: torch.optim.Optimizer, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:
        optimizer.step(closure_for(optimizer, model, batch))


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


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


# --- state


def test_the_state_is_the_base_optimizers_and_loads_as_weights_only() -> None:
    a, b = small_net(), small_net()
    amp, sgd = AMP(a.parameters(), **SGD_ARGS), torch.optim.SGD(b.parameters(), **SGD_ARGS)
    train(amp, a, small_batches(2))
    train(sgd, b, small_batches(2))
    ours, theirs = amp.state_dict(), sgd.state_dict()
    assert {k: v.keys() for k, v in ours["state"].items()} == {k: v.keys() for k, v in theirs["state"].items()}
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys() | {"epsilon", "inner_lr"}
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert str(torch.load(file, weights_only=True)) == str(ours)


@pytest.mark.parametrize("base", ["SGD", "adamw", "lamb"])
@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_resume_is_bit_exact(base: str, norm: Any) -> None:
    kwargs = {"lr": 0.01, "base_optimizer": base, "norm": norm, "momentum": 0.9 if base == "SGD" else None}
    model, batches = small_net(), small_batches(6)
    optimizer = AMP(model.parameters(), **kwargs)
    train(optimizer, model, batches[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, model, batches[3:])
    resumed = small_net(seed=5)
    again = AMP(resumed.parameters(), **kwargs)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(again, resumed, batches[3:])
    assert_same_parameters(model, resumed)


def test_a_checkpoint_of_the_base_optimizer_loads() -> None:
    model = small_net()
    sgd = torch.optim.SGD(model.parameters(), **SGD_ARGS)
    train(sgd, model, small_batches(1))
    amp = AMP(model.parameters(), **SGD_ARGS, epsilon=0.3)
    amp.load_state_dict(sgd.state_dict())
    assert amp.param_groups[0]["epsilon"] == 0.3
    train(amp, model, small_batches(1))


@pytest.mark.parametrize("load_first", [False, True])
def test_schedulers_move_the_learning_rate_that_trains(load_first: bool) -> None:
    model, batches = small_net(), small_batches(4)
    optimizer = AMP(model.parameters(), **SGD_ARGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    if load_first:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, batches[:1])
    scheduler.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)
    for group in optimizer.base_optimizer.param_groups:
        group["momentum"] = 0.0
        group["lr"] = 0.0
    before = parameters_of(model)
    train(optimizer, model, batches[1:])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_loading_into_the_base_optimizer_keeps_one_set_of_groups() -> None:
    model = small_net()
    optimizer = AMP(model.parameters(), **SGD_ARGS)
    optimizer.base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.0
    assert optimizer.state is optimizer.base_optimizer.state


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle_train_on_like_the_original(duplicate: Callable[[Any], Any]) -> None:
    model, batches = small_net(), small_batches(4)
    optimizer = AMP(model.parameters(), **SGD_ARGS, norm="global", inner_iter=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    train(optimizer, model, batches[:2])
    twin_model, twin = duplicate((model, optimizer))
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    public = {k for k in vars(optimizer) if not k.startswith("_")} - {"step"}  # step: patched in by schedulers
    assert public <= vars(twin).keys() | set(dir(twin))
    assert (twin.norm, twin.inner_iter) == ("global", 2)
    assert twin.base_optimizer.param_groups is twin.param_groups
    train(optimizer, model, batches[2:])
    train(twin, twin_model, batches[2:])
    assert_same_parameters(model, twin_model)
    scheduler.step()


def test_no_copy_and_no_load_while_the_weights_are_perturbed() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    state = optimizer.state_dict()
    closure_for(optimizer, model, batch)()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match=r"cannot copy or pickle.*restore\(\)"):
        copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match=r"cannot load.*restore\(\)"):
        optimizer.load_state_dict(state)


def test_hooks_run_once_per_step() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load"))
    optimizer.step(closure_for(optimizer, model, batch))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "load"]


# --- base optimizers


@pytest.mark.parametrize(
    ("base", "expected"),
    [(torch.optim.AdamW, "AdamW"), ("AdamW", "AdamW"), ("adamw", "AdamW"), ("lamb", "Lamb"), ("sgd", "SGD")],
)
def test_base_optimizers_by_class_and_by_name(base: Any, expected: str) -> None:
    model = small_net()
    optimizer = AMP(model.parameters(), 0.001, base_optimizer=base)
    assert type(optimizer.base_optimizer).__name__ == expected
    assert f"AMP({expected}, norm='tensor', inner_iter=1)" in repr(optimizer)
    train(optimizer, model, small_batches(1))


def test_timm_names_come_with_timm_defaults_and_its_rule_for_momentum() -> None:
    sgd = AMP(small_net().parameters(), 0.1, base_optimizer="sgd", momentum=0.9)
    assert sgd.param_groups[0]["nesterov"] is True
    AMP(small_net().parameters(), 0.1, base_optimizer="adamw", momentum=0.9)
    with pytest.raises(TypeError, match="momentum"):
        AMP(small_net().parameters(), 0.1, base_optimizer=torch.optim.AdamW, momentum=0.9)


def test_unusable_base_optimizers() -> None:
    params = list(small_net().parameters())
    with pytest.raises(ValueError, match=r"base_optimizer 'addamw' is unknown; did you mean adamw"):
        AMP(params, 0.1, base_optimizer="addamw")
    with pytest.raises(ValueError, match="'amp' is unknown"):
        AMP(params, 0.1, base_optimizer="amp")
    with pytest.raises(ValueError, match="LBFGS needs a closure of its own"):
        AMP(params, 0.1, base_optimizer=torch.optim.LBFGS)
    with pytest.raises(TypeError, match="base_optimizer must be an optimizer class"):
        AMP(params, 0.1, base_optimizer=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="base_optimizer must make a"):
        AMP(params, base_optimizer=lambda params: params)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["lr", "epsilon", "inner_lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "much"])
def test_invalid_numbers_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a finite number >= 0, got {value!r}"):
        AMP(small_net().parameters(), **{name: value})


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_invalid_inner_iter(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"inner_iter must be an integer >= 0, got {value!r}"):
        AMP(small_net().parameters(), 0.1, inner_iter=value)


def test_a_schedule_that_ruins_epsilon_is_noticed() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP([{"params": model[0].parameters()}, {"params": model[5].parameters()}], 0.1)
    optimizer.param_groups[1]["epsilon"] = math.nan
    with pytest.raises(ValueError, match="epsilon must be a finite number >= 0, got nan"):
        optimizer.step(closure_for(optimizer, model, batch))
    assert not optimizer.perturbed


def test_sixteen_bit_weights_are_warned_about_once() -> None:
    model = small_net(torch.bfloat16)
    optimizer = AMP(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="16-bit weights") as record:
        train(optimizer, model, small_batches(2, dtype=torch.bfloat16))
    assert len(record) == 1


# --- what the additional passes leave alone (amp_plugin.passes)


def test_extra_passes_keep_dropout_masks_and_running_statistics() -> None:
    """With a vanishing ball the step must equal SGD with the same dropout masks, and one BatchNorm update."""
    a, b, batches = small_net(dropout=0.5), small_net(dropout=0.5), small_batches(3)
    amp, sgd = AMP(a.parameters(), 0.1, epsilon=1e-30), torch.optim.SGD(b.parameters(), 0.1)
    passes = ExtraPasses(a)
    torch.manual_seed(3)
    for batch in batches:
        amp.step(closure_for(amp, a, batch), passes=passes)
    torch.manual_seed(3)
    train(sgd, b, batches)
    assert_same_parameters(a, b)
    for p, q in zip(a.buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q)
