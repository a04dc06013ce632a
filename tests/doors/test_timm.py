from __future__ import annotations

import copy
import inspect
import pickle
from argparse import Namespace
from collections.abc import Callable

import pytest
import timm
import torch
from problems import closure_for, small_batches, small_net
from timm.optim import Lookahead, create_optimizer, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from amp_plugin import AMP
from amp_plugin.doors.timm import AMPAdamW

NAMES = ["amp", "ampadamw", "amplamb"]


@pytest.mark.parametrize(("name", "base"), zip(NAMES, ["SGD", "AdamW", "Lamb"], strict=True))
def test_create_optimizer_v2(name: str, base: str) -> None:
    model = small_net()
    optimizer = create_optimizer_v2(
        model, opt=name, lr=0.01, weight_decay=0.05, epsilon=0.3, inner_lr=0.2, inner_iter=2, norm="global"
    )
    assert isinstance(optimizer, AMP)
    assert type(optimizer.base_optimizer).__name__ == base
    assert (optimizer.inner_iter, optimizer.norm) == (2, "global")
    assert [(g["weight_decay"], g["epsilon"], g["inner_lr"]) for g in optimizer.param_groups] == [
        (0.0, 0.3, 0.2),
        (0.05, 0.3, 0.2),
    ]
    optimizer.step(closure_for(optimizer, model, small_batches(1)[0]))


def test_amp_gets_timms_sgd() -> None:
    group = create_optimizer_v2(small_net(), opt="amp", lr=0.1, momentum=0.8).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)


def test_the_base_optimizer_resolves_from_a_name_as_opt_kwargs_give_it() -> None:
    optimizer = create_optimizer_v2(small_net(), opt="amp", lr=0.1, base_optimizer="lion")
    assert type(optimizer.base_optimizer).__name__ == "Lion"


def test_create_optimizer_from_train_py_arguments() -> None:
    args = Namespace(opt="amp", lr=0.1, weight_decay=1e-4, momentum=0.9, opt_args={"epsilon": 0.25})
    optimizer = create_optimizer(args, small_net(), filter_bias_and_bn=False)
    assert isinstance(optimizer, AMP)
    assert [(g["epsilon"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 1e-4)]


def test_lookahead_wraps_amp() -> None:
    model = small_net()
    optimizer = create_optimizer_v2(model, opt="lookahead_amp", lr=0.1)
    assert isinstance(optimizer, Lookahead)
    optimizer.step(closure_for(optimizer, model, small_batches(1)[0]))


@pytest.mark.parametrize("name", NAMES)
def test_listed_and_described(name: str) -> None:
    assert name in list_optimizers()
    assert name in list_optimizers("amp*", with_description=False)
    info = get_optimizer_info(name)
    assert "Adversarial Model Perturbation" in info.description
    arguments = inspect.signature(info.opt_class.__init__).parameters
    assert info.has_eps == ("eps" in arguments)
    assert info.has_momentum == ("momentum" in arguments)
    assert info.has_betas == ("betas" in arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_all_public_attributes(name: str, duplicate: Callable[[AMP], AMP]) -> None:
    optimizer = create_optimizer_v2(small_net(), opt=name, lr=0.1)
    twin = duplicate(optimizer)
    assert type(twin) is type(optimizer)
    for attribute in (a for a in vars(optimizer) if not a.startswith("_")):
        assert hasattr(twin, attribute), attribute
    assert repr(twin) == repr(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_the_basic_cases_of_timms_own_suite(name: str) -> None:
    """A loss that falls, a state that loads deterministically, as timm asks of every optimizer it lists."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
    inputs = torch.randn(5)

    def make(weight: Tensor, bias: Tensor) -> torch.optim.Optimizer:
        return create_optimizer_v2([weight, bias], name, lr=1e-2, epsilon=0.01)

    def closure(optimizer: torch.optim.Optimizer, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = (weight.mv(inputs) + bias).pow(2).sum()
            loss.backward()
            return loss

        return run

    optimizer = make(weight, bias)
    first = optimizer.step(closure(optimizer, weight, bias)).item()
    for _ in range(20):
        last = optimizer.step(closure(optimizer, weight, bias)).item()
    assert last < first
    weight_c, bias_c = (nn.Parameter(p.detach().clone()) for p in (weight, bias))
    optimizer_c = make(weight_c, bias_c)
    optimizer_c.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(20):
        optimizer.step(closure(optimizer, weight, bias))
        optimizer_c.step(closure(optimizer_c, weight_c, bias_c))
    assert torch.equal(weight, weight_c)
    assert torch.equal(bias, bias_c)
    assert optimizer.state_dict()["param_groups"] == optimizer_c.state_dict()["param_groups"]


def test_timms_schedulers_and_layer_decay() -> None:
    model = timm.create_model("preactresnet18", width=8, layers=(1, 1, 1, 1))
    optimizer = create_optimizer_v2(model, opt="amp", lr=0.1, layer_decay=0.5)
    scales = {g["lr_scale"] for g in optimizer.param_groups}
    assert len(scales) > 1
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    lrs = {g["lr"] / g["lr_scale"] for g in optimizer.base_optimizer.param_groups}
    assert all(lr == pytest.approx(0.05) for lr in lrs)


@pytest.mark.parametrize("name", ["ampadamw", "amplamb"])
def test_the_base_optimizers_own_arguments_arrive(name: str) -> None:
    optimizer = create_optimizer_v2(small_net(), opt=name, lr=0.01, betas=(0.8, 0.7), eps=1e-5)
    assert all((tuple(g["betas"]), g["eps"]) == ((0.8, 0.7), 1e-5) for g in optimizer.param_groups)
    assert AMPAdamW(small_net().parameters(), weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
