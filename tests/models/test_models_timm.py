"""Tests of timm's contract, on small networks of every kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import RESIDUAL, SMALL, every_small, images, small
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn


@every_small
@pytest.mark.parametrize("size", [(32, 32), (45, 38)])
@pytest.mark.parametrize("global_pool", ["avg", "catavgmax"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_forward_and_backward(name: str, size: tuple[int, int], global_pool: str, in_chans: int) -> None:
    model = small(name, in_chans=in_chans, num_classes=7, global_pool=global_pool, drop_rate=0.1)
    logits = model(images(chans=in_chans, size=size))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_vgg_refuses_images_below_32() -> None:
    with pytest.raises(RuntimeError, match="Output size is too small"):
        small("cifar_vgg16")(images(size=(31, 32)))


@every_small
def test_forward_is_features_then_head(name: str) -> None:
    model, x = small(name).eval(), images()
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert features.shape[:2] == (3, model.num_features)
    assert pre_logits.shape == (3, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))


@every_small
def test_reset_classifier(name: str) -> None:
    model, x = small(name, dtype=torch.float64).eval(), images().double()
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pre_logits)
    model.reset_classifier(0, "")
    unpooled = model(x)
    assert unpooled.shape == (3, model.head_hidden_size, *model.forward_features(x).shape[-2:])
    model.reset_classifier(100, "catavgmax")
    assert model.num_classes == 100
    assert model.get_classifier().in_features == model.head_hidden_size == 2 * unpooled.shape[1]
    assert model(x).shape == (3, 100)
    assert not model.head.training


@every_small
def test_create_without_classifier(name: str) -> None:
    assert small(name, num_classes=0).eval()(images()).ndim == 2
    assert small(name, num_classes=0, global_pool="").eval()(images()).ndim == 4


@every_small
@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook"])
def test_features_only(name: str, feature_cls: str) -> None:
    reference, x = small(name).eval(), images(size=(64, 32))
    expected, y = [], reference.stem(x)
    for stage in reference.stages:
        y = stage(y)
        expected.append(y)
    model = small(name, features_only=True, feature_cls=feature_cls).eval()
    outputs = model(x)
    for output, stage_output in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, stage_output)
    assert model.feature_info.channels() == [output.shape[1] for output in outputs]
    assert model.feature_info.reduction() == [64 // output.shape[2] for output in outputs]
    first = small(name, features_only=True, feature_cls=feature_cls, out_indices=(0,)).eval()(x)
    torch.testing.assert_close(first, expected[:1])


@every_small
def test_forward_intermediates(name: str) -> None:
    model, x = small(name).eval(), images()
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    _, normed = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(normed, [*intermediates[:-1], final])
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    torch.testing.assert_close(last_two, intermediates[-2:])
    early, (second,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close((early, second), (intermediates[1], intermediates[1]))
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_small
def test_pruned_model_takes_a_new_classifier(name: str) -> None:
    model, x = small(name).eval(), images()
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0].mean((2, 3))
    assert model.prune_intermediate_layers([1]) == [1]
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
    assert model(x).shape == (3, 5)


@every_small
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_follows_the_depth(name: str, coarse: bool) -> None:
    model = small(name)
    layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert layer.keys() == dict(model.named_parameters()).keys()
    order = [layer[key] for key, _ in model.named_parameters()]
    groups = model.stages if coarse else [block for stage in model.stages for block in stage]
    with_params = sum(len(list(group.parameters())) > 0 for group in groups)
    assert order == sorted(order)
    assert sorted(set(order)) == list(range(with_params + 2))  # stem, blocks, head
    last = max(layer.values())
    in_head = {key for key, index in layer.items() if index == last}
    assert in_head == {key for key in layer if key.startswith(("pre_logits.", "head."))}


@every_small
def test_layer_decay(name: str) -> None:
    model = small(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale.keys() == set(model.parameters())
    assert scale[model.get_classifier().weight] == 1
    assert min(scale.values()) == scale[next(model.stem.parameters())] < 0.5


@every_small
@pytest.mark.parametrize("drop_rates", [{}, {"drop_rate": 0.2, "conv_drop_rate": 0.2}])
def test_checkpointing_keeps_the_gradients(name: str, drop_rates: dict[str, float]) -> None:
    if drop_rates and name in RESIDUAL:
        drop_rates = drop_rates | {"drop_path_rate": 0.3}
    model, x = small(name, **drop_rates), images()
    runs = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().sum()
        runs.append((torch.autograd.grad(loss, list(model.parameters())), len(saved)))
    (plain, num_plain), (checkpointed, num_checkpointed) = runs
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    assert num_checkpointed < num_plain
    assert torch.equal(model.eval().forward_intermediates(x)[0], model.forward_features(x))


@every_small
def test_deepcopy_is_independent(name: str) -> None:
    model, x = small(name).eval(), images()
    logits = model(x)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(x), logits)


@every_small
def test_channels_last(name: str) -> None:
    model, x = small(name), images(size=(64, 64))
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    logits = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    y = model.stem(x.to(memory_format=torch.channels_last))
    for layer in (layer for stage in model.stages for layer in stage):
        y = layer(y)
        assert y.is_contiguous(memory_format=torch.channels_last)


@every_small
def test_compiles_to_one_graph_once(name: str) -> None:
    model, x = small(name), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1, 2, 3):
            torch.testing.assert_close(compiled(scale * x), model(scale * x))


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        *((name, rate) for name in SMALL for rate in ("drop_rate", "conv_drop_rate")),
        *((name, "drop_path_rate") for name in RESIDUAL),
    ],
)
def test_drop_rates_act_in_training_alone(name: str, rate: str) -> None:
    plain, model, x = small(name), small(name, **{rate: 0.5}), images()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(model(x), model(x))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", RESIDUAL)
def test_drop_path_rate_rises_linearly_to_the_last_block(name: str) -> None:
    rates = [block.drop_path.drop_prob for stage in small(name, drop_path_rate=0.4).stages for block in stage]
    assert rates == pytest.approx([0.4 * k / (len(rates) - 1) for k in range(len(rates))])


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        *((name, {"no_such_option": 1}, TypeError, "no_such_option") for name in SMALL),
        *((name, {"global_pool": ""}, ValueError, "num_classes=10 with global_pool=''") for name in SMALL),
        *((name, {"layers": (2, 2)}, ValueError, r"layers=\(2, 2\)") for name in RESIDUAL),
        ("wrn28_10", {"layers": (1, 0, 1)}, ValueError, "at least 1"),
        *((name, {"width": 0}, ValueError, "width=0") for name in SMALL if "pyramidnet" not in name),
        ("pyramidnet110_48", {"alpha": -1}, ValueError, "alpha=-1"),
        ("cifar_vgg16", {"drop_path_rate": 0.1}, TypeError, "drop_path_rate"),
    ],
)
def test_bad_arguments_are_refused(name: str, kwargs: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        small(name, **kwargs)


def test_classifier_without_pooling_is_refused_on_reset() -> None:
    with pytest.raises(ValueError, match="num_classes=5"):
        small("wrn28_10").reset_classifier(5, "")
