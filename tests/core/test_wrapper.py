from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import SGD_ARGS, assert_same_parameters, closure_for, parameters_of, small_batches, small_net, train

from amp_plugin import AMP


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
    for group in optimizer.param_groups:  # as a scheduler does
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


class Quantised(torch.optim.SGD):
    """Keeps codes, a generator's state and modes, as 8-bit, random and schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, momentum=0.9)
        self.draws, self.mode = 0, "train"

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.draws += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["codes"] = torch.full(p.shape, self.draws, dtype=torch.uint8)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "draws": self.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.draws = state_dict["draws"]
        for state in self.state.values():
            state["codes"] = state["codes"].to(torch.uint8)

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_the_base_optimizer_saves_and_loads_its_own_state() -> None:
    model = small_net()
    amp = AMP(model.parameters(), 0.1, base_optimizer=Quantised)
    train(amp, model, small_batches(3))
    saved = copy.deepcopy(amp.state_dict())
    again = AMP(small_net().parameters(), 0.1, base_optimizer=Quantised)
    again.load_state_dict(saved)
    base: Any = again.base_optimizer
    assert base.draws == 3
    assert {state["codes"].dtype for state in again.state.values()} == {torch.uint8}
    assert {int(state["codes"].max()) for state in again.state.values()} == {3}


def test_the_modes_of_the_base_optimizer_are_switched_at_the_clean_weights() -> None:
    model = small_net()
    amp = AMP(model.parameters(), 0.1, base_optimizer=Quantised)
    base: Any = amp.base_optimizer
    amp.eval()
    assert base.mode == "eval"
    amp.train()
    assert base.mode == "train"
    closure_for(amp, model, small_batches(1)[0])()
    amp.ascend()
    amp.train()  # as the stock Trainer does in every step
    with pytest.raises(RuntimeError, match="cannot leave the training's mode while the weights are perturbed"):
        amp.eval()
    assert base.mode == "train"
    AMP(small_net().parameters(), 0.1).eval()  # SGD has none


def test_hooks_run_once_per_step() -> None:
    model, batch = small_net(), small_batches(1)[0]
    optimizer = AMP(model.parameters(), 0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load"))
    optimizer.step(closure_for(optimizer, model, batch))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "before saving", "saved", "before loading", "load"]
