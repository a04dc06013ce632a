"""Tests of the architectures: sizes, registration, and the forward pass computed again by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from amp_plugin.models import CifarVGG, PreActResNet, PyramidNet, WideResNet
from amp_plugin.models.preactresnet import PreActBasicBlock, PreActBottleneck
from amp_plugin.models.pyramidnet import PyramidBasicBlock, PyramidBottleneck

ALL = (
    *("preactresnet18", "preactresnet34", "preactresnet50"),
    *("pyramidnet110_48", "pyramidnet110_84", "pyramidnet110_270", "pyramidnet164_48", "pyramidnet164_270"),
    *("wrn28_10", "cifar_vgg16"),
)


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The published networks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("preactresnet18", 11_176_906),
        ("pyramidnet110_48", 1_772_706),
        ("pyramidnet110_270", 28_485_477),
        ("pyramidnet164_270", 27_216_021),
        ("wrn28_10", 36_479_194),
        ("cifar_vgg16", 33_646_666),
    ],
)
def test_parameter_counts_are_those_of_the_paper(name: str, expected: int) -> None:
    assert num_params(timm.create_model(name, device="meta")) == expected


def test_preactresnet18_has_75_parameter_tensors() -> None:
    assert len(list(timm.create_model("preactresnet18", device="meta").parameters())) == 75


def test_preactresnet_of_one_block_per_stage_is_small() -> None:
    model = timm.create_model("preactresnet18", width=16, layers=(1, 1, 1, 1), device="meta")
    assert round(num_params(model) / 1e6, 2) == 0.31


@pytest.mark.parametrize("name", ALL)
def test_depth_is_the_number_in_the_name(name: str) -> None:
    model = timm.create_model(name, device="meta")
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    main_path = sum("shortcut" not in key for key in convs) + linears
    # Zagoruyko and Komodakis count all convolutions, the other papers the weighted layers on the main path.
    depth = len(convs) if name == "wrn28_10" else main_path
    assert re.findall(r"\d+", name)[0] == str(depth)


@pytest.mark.parametrize("name", [name for name in ALL if "pyramidnet" in name])
def test_pyramidnet_widens_evenly_by_alpha(name: str) -> None:
    alpha = int(name.rsplit("_", 1)[1])
    blocks = [block for stage in timm.create_model(name, device="meta").stages for block in stage]
    widths = [block.bn4.num_features / 4 if "164" in name else block.bn3.num_features for block in blocks]
    assert widths[-1] == 16 + alpha
    assert all(abs(width - (16 + alpha * k / 54)) <= 0.5 for k, width in enumerate(widths, start=1))


@pytest.mark.parametrize("name", ALL)
def test_name_is_free_in_timm(name: str) -> None:
    assert not hasattr(timm.models, name)
    assert timm.model_entrypoint(name).__module__.startswith("amp_plugin.models.")


@pytest.mark.parametrize("name", ALL)
def test_no_weights_are_published(name: str) -> None:
    assert not timm.is_model_pretrained(name)
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True, device="meta")


@pytest.mark.parametrize("name", ALL)
def test_pretrained_cfg_describes_the_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        features = model.forward_features(torch.empty(1, 3, 32, 32))
    cfg, state_dict = model.pretrained_cfg, model.state_dict()
    assert cfg["input_size"] == (3, 32, 32)
    assert cfg["pool_size"] == tuple(features.shape[-2:])
    assert state_dict[cfg["first_conv"] + ".weight"].shape[1] == 3
    assert state_dict[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"] == 10
    assert [round(255 * value, 1) for value in cfg["mean"]] == [125.3, 123.0, 113.9]
    assert [round(255 * value, 1) for value in cfg["std"]] == [63.0, 62.1, 66.7]
    assert cfg["license"] == "mit"


# The forward pass, computed again from the weights by elementary operations


def randomise_norms(module: nn.Module) -> None:
    """Make every BatchNorm matter, by affine parameters and running statistics unlike the initial ones."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)


def batch_norm(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    shape = (1, -1, 1, 1)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (x - norm.running_mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)


def conv(x: torch.Tensor, layer: nn.Conv2d, stride: int = 1) -> torch.Tensor:
    return F.conv2d(x, layer.weight, layer.bias, stride, padding=layer.weight.shape[-1] // 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block_type", [PreActBasicBlock, PreActBottleneck])
@pytest.mark.parametrize(("out_chs", "stride"), [(8, 1), (8, 2), (12, 1), (16, 2)])
def test_preact_block_by_hand(block_type: Any, out_chs: int, stride: int, bias: bool) -> None:
    block = block_type(8, out_chs, stride, 0.0, bias=bias, conv_drop_rate=0.0).double().eval()
    randomise_norms(block)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    preact = batch_norm(x, block.bn1).relu()
    y = conv(preact, block.conv1, stride)
    y = conv(batch_norm(y, block.bn2).relu(), block.conv2)
    if block_type is PreActBottleneck:
        y = conv(batch_norm(y, block.bn3).relu(), block.conv3)
    shortcut = x if (out_chs, stride) == (8, 1) else conv(preact, block.shortcut, stride)
    torch.testing.assert_close(block(x), y + shortcut)


@pytest.mark.parametrize("block_type", [PyramidBasicBlock, PyramidBottleneck])
@pytest.mark.parametrize(("out_chs", "stride"), [(8, 1), (12, 1), (12, 2)])
def test_pyramid_block_by_hand(block_type: Any, out_chs: int, stride: int) -> None:
    block = block_type(8, out_chs, stride, 0.0, conv_drop_rate=0.0).double().eval()
    randomise_norms(block)
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    y = batch_norm(x, block.bn1)
    if block_type is PyramidBasicBlock:
        y = conv(batch_norm(conv(y, block.conv1, stride), block.bn2).relu(), block.conv2)
        y = batch_norm(y, block.bn3)
    else:
        y = conv(batch_norm(conv(y, block.conv1), block.bn2).relu(), block.conv2, stride)
        y = batch_norm(conv(batch_norm(y, block.bn3).relu(), block.conv3), block.bn4)
    shortcut = x
    if stride == 2:
        shortcut = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    y[:, :8] += shortcut
    torch.testing.assert_close(block(x), y)


def test_vgg_by_hand() -> None:
    model = CifarVGG(width=4).double().eval()
    randomise_norms(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    y = x
    for index, (layer, norm) in enumerate(zip(convs, norms, strict=True), start=1):
        y = batch_norm(conv(y, layer), norm).relu()
        if index in (2, 4, 7, 10, 13):
            y = F.max_pool2d(y, 2)
    for fc in (model.pre_logits.fc1, model.pre_logits.fc2):
        y = (y.flatten(1) @ fc.weight.T + fc.bias).relu()
    torch.testing.assert_close(model(x), y @ model.head.fc.weight.T + model.head.fc.bias)


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        (PreActResNet, {"block": PreActBottleneck, "layers": (1, 2, 1, 1), "width": 4}),
        (PyramidNet, {"block": PyramidBottleneck, "layers": (1, 2, 1), "alpha": 10}),
        (WideResNet, {"layers": (1, 2, 1), "width": 1}),
    ],
)
def test_residual_network_by_hand(model_type: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    model = model_type(**kwargs).double().eval()
    randomise_norms(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    norm_in_stem = isinstance(model, PyramidNet)
    y = conv(x, model.stem[0] if norm_in_stem else model.stem)
    if norm_in_stem:
        y = batch_norm(y, model.stem[1])
    for stage_index, stage in enumerate(model.stages):
        for block in stage:
            y = block(y)
        assert y.shape[-1] == 32 >> stage_index
    y = batch_norm(y, model.norm[0]).relu().mean((2, 3))
    torch.testing.assert_close(model(x), y @ model.head.fc.weight.T + model.head.fc.bias)


# The networks of the code released with AMP, restated from its repository in functions of the weights


def trained_norm(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    """BatchNorm by the statistics of the batch."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + norm.eps) * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def released_preact(x: torch.Tensor, block: Any, stride: int) -> torch.Tensor:
    preact = trained_norm(x, block.bn1).relu()
    y = conv(preact, block.conv1, stride)
    y = conv(trained_norm(y, block.bn2).relu(), block.conv2)
    if block.conv3 is not None:
        y = conv(trained_norm(y, block.bn3).relu(), block.conv3)
    return y + (preact if block.shortcut is None else conv(preact, block.shortcut, stride))


def released_wide(x: torch.Tensor, block: Any, stride: int) -> torch.Tensor:
    y = conv(trained_norm(x, block.bn1).relu(), block.conv1)
    y = conv(trained_norm(y, block.bn2).relu(), block.conv2, stride)
    return y + (x if block.shortcut is None else conv(x, block.shortcut, stride))


RELEASED = [
    ("preactresnet18", {"width": 4, "layers": (1, 2, 1, 1)}, released_preact),
    ("preactresnet50", {"width": 4, "layers": (2, 1, 1, 1)}, released_preact),
    ("wrn28_10", {"width": 1, "layers": (2, 1, 1)}, released_wide),
]


@pytest.mark.parametrize(("name", "arguments", "block_by_hand"), RELEASED)
def test_a_network_as_released_by_hand(
    name: str, arguments: dict[str, Any], block_by_hand: Callable[[torch.Tensor, Any, int], torch.Tensor]
) -> None:
    model = timm.create_model(name, as_released=True, **arguments).double()
    papers = timm.create_model(name, **arguments).double()
    papers.load_state_dict(model.state_dict())  # the same parameters
    randomise_norms(model)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    y = conv(x, model.stem)
    for number, stage in enumerate(model.stages):
        for place, block in enumerate(stage):
            y = block_by_hand(y, block, 2 if number > 0 and place == 0 else 1)
    before = model.norm[0].running_mean.clone()
    torch.testing.assert_close(
        model(x), trained_norm(y, model.norm[0]).relu().mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias
    )
    momentum = 0.9 if name == "wrn28_10" else 0.1
    torch.testing.assert_close(model.norm[0].running_mean, (1 - momentum) * before + momentum * y.mean((0, 2, 3)))
    papers.load_state_dict(model.state_dict())
    assert not torch.allclose(papers(x), model(x), rtol=0.05)


def test_a_block_that_was_not_released_is_refused() -> None:
    with pytest.raises(ValueError, match="no released form of PyramidBasicBlock; leave it out"):
        PreActResNet(block=PyramidBasicBlock, as_released=True)


def test_sync_batchnorm_conversion_keeps_the_function() -> None:
    model = PreActResNet(layers=(1, 1, 1, 1), width=4).eval()
    x = torch.randn(2, 3, 32, 32)
    logits = model(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model)(x), logits)


@pytest.mark.parametrize("model_type", [CifarVGG, PreActResNet, PyramidNet, WideResNet])
def test_initialisation(model_type: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = model_type() if model_type is PyramidNet else model_type(width=4)
    model.reset_classifier(100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 1000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
