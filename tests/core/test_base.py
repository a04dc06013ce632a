from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import closure_for, small_batches, small_net, train
from torch import nn

from amp_plugin import AMP


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
    with pytest.raises(ValueError, match=r"base_optimizer 'addamw' is unknown, did you mean 'adamw'"):
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


def test_torch_optims_names_come_with_torchs_defaults() -> None:
    assert AMP(small_net().parameters(), 0.1, base_optimizer="SGD").param_groups[0]["nesterov"] is False


# --- what the additional passes leave alone (amp_plugin.core.replay)


class Steps(torch.optim.Optimizer):
    """A base whose learning rate may be None, or not be there, as Adafactor's may; its steps are 0.1 long then."""

    def __init__(self, params: Any, lr: float | None = None, *, has_lr: bool = True) -> None:
        super().__init__(params, {"lr": lr} if has_lr else {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_((0.1 if group.get("lr") is None else group["lr"]) * p.grad)


@pytest.mark.parametrize("kwargs", [{}, {"lr": None}, {"has_lr": False}])
def test_a_base_optimizer_may_have_no_learning_rate(kwargs: dict[str, Any]) -> None:
    nets, batch = [small_net(), small_net()], small_batches(1)[0]
    optimizer = AMP(nets[0].parameters(), base_optimizer=Steps, epsilon=1e-12, **kwargs)
    base = Steps(nets[1].parameters(), **kwargs)
    assert [group.get("lr") for group in optimizer.param_groups] == [None]
    with pytest.raises(RuntimeError, match="would train without the perturbation"):
        optimizer.step()
    optimizer.step(closure_for(optimizer, nets[0], batch))
    closure_for(base, nets[1], batch)()
    base.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_each_door_that_the_error_of_a_bare_step_names_is_there() -> None:
    with pytest.raises(RuntimeError) as raised:
        AMP(small_net().parameters(), 0.1).step()
    doors = set(re.findall(r"amp_plugin[\w.]*\w", str(raised.value)))
    assert {name.rpartition(".")[2] for name in doors} == {"attach", "AMPTrainer", "AMPMixin", "AMPCallback"}
    for name in doors:
        module, _, door = name.rpartition(".")
        spec = importlib.util.find_spec(module)  # not imported: fastai may be absent
        assert spec is not None
        assert spec.origin is not None
        assert re.search(rf'(class |"){door}\b', Path(spec.origin).read_text(encoding="utf-8"))


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize(("rates", "lr"), [((None, None), None), ((0.3, None), None), ((0.3, None), 0.2)])
def test_learning_rates_are_the_base_optimizers_own_unless_they_are_given(
    rates: tuple[float | None, ...], lr: float | None, base: str
) -> None:
    """As a default, in one group or in all; a schedule moves them."""
    params = [nn.Parameter(torch.ones(2)) for _ in rates]
    given = [{} if rate is None else {"lr": rate} for rate in rates]
    ours, theirs = ([{"params": [p], **own} for p, own in zip(params, given, strict=True)] for _ in range(2))
    optimizer = AMP(ours, lr, base_optimizer=base)
    plain = getattr(torch.optim, base)(theirs, **({} if lr is None else {"lr": lr}))
    for each in (optimizer, plain):
        torch.optim.lr_scheduler.LambdaLR(each, lambda _: 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
