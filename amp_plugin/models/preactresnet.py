"""Pre-activation ResNet for small images.

He, Zhang, Ren, Sun. *Identity Mappings in Deep Residual Networks*. ECCV 2016, https://arxiv.org/abs/1603.05027
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from amp_plugin.models.staged import StagedNet, bn_relu, check_layers, check_width, cifar_cfg, residual_stages

__all__ = ["PreActBasicBlock", "PreActBottleneck", "PreActResNet"]


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU: `(B, in_chs, H, W)` to `(B, out_chs, H', W')`.

    A block that changes the shape projects its first pre-activation to the shortcut with a 1x1 convolution;
    any other block adds its input as it is.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the first convolution.
        drop_path_rate: Probability of dropping the residual branch.
        bias: Whether the convolutions have biases.
        conv_drop_rate: Dropout rate before the last convolution.
        **dd: Device and dtype of the parameters.
    """

    expansion = 1

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_path_rate: float,
        *,
        bias: bool,
        conv_drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=bias, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=bias, **dd)
        self.shortcut = _projection(in_chs, out_chs, stride, bias=bias, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(conv_drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the residual to the shortcut."""
        preact = self.act(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(preact)
        x = self.conv1(preact)
        x = self.conv2(self.drop(self.act(self.bn2(x))))
        x = self.drop_path(x)
        return x + shortcut


class PreActBottleneck(nn.Module):
    """1x1 (strided), 3x3 and 1x1 convolutions, each after BatchNorm and ReLU.

    Shapes, shortcut and arguments are those of `PreActBasicBlock`; the inner width is `out_chs // 4`.
    """

    expansion = 4

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_path_rate: float,
        *,
        bias: bool,
        conv_drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        mid_chs = out_chs // self.expansion
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, stride=stride, bias=bias, **dd)
        self.bn2 = nn.BatchNorm2d(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, padding=1, bias=bias, **dd)
        self.bn3 = nn.BatchNorm2d(mid_chs, **dd)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=bias, **dd)
        self.shortcut = _projection(in_chs, out_chs, stride, bias=bias, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(conv_drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the residual to the shortcut."""
        preact = self.act(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(preact)
        x = self.conv1(preact)
        x = self.conv2(self.act(self.bn2(x)))
        x = self.conv3(self.drop(self.act(self.bn3(x))))
        x = self.drop_path(x)
        return x + shortcut


def _projection(in_chs: int, out_chs: int, stride: int, *, bias: bool, **dd: Any) -> nn.Conv2d | None:
    if stride == 1 and in_chs == out_chs:
        return None
    return nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=bias, **dd)


class PreActResNet(StagedNet):
    """Pre-activation ResNet: a 3x3 stem without pooling and four stages, for images of 32x32 or larger.

    As in the code released with AMP, every convolution but the stem has a bias.

    Args:
        block: Type of the blocks.
        layers: Number of blocks in each of the four stages.
        width: Channels of the stem and inner channels of the first stage; they double from stage to stage.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout rate before the classifier.
        conv_drop_rate: Dropout rate before the last convolution of each block.
        drop_path_rate: Stochastic depth rate of the last block.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `layers` are not four positive counts, `width` is not positive, or there are
            classes but no pooling.
    """

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck] = PreActBasicBlock,
        layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        conv_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_layers(layers, 4)
        check_width(width)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [[width * 2**stage * block.expansion] * depth for stage, depth in enumerate(layers)]
        make_block = partial(block, bias=True, conv_drop_rate=conv_drop_rate, **dd)
        stages, feature_info = residual_stages(make_block, width, widths, drop_path_rate)
        super().__init__(
            stem=nn.Conv2d(in_chans, width, 3, padding=1, bias=False, **dd),
            stages=stages,
            feature_info=feature_info,
            norm=bn_relu(widths[-1][-1], **dd),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _create_preactresnet(variant: str, pretrained: bool, **kwargs: Any) -> PreActResNet:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(PreActResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "preactresnet18": cifar_cfg(pool_size=4),
        "preactresnet34": cifar_cfg(pool_size=4),
        "preactresnet50": cifar_cfg(pool_size=4),
    }
)


@register_model
def preactresnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18, the network of most of the AMP paper's tables: 11.18M parameters."""
    model_args = {"block": PreActBasicBlock, "layers": (2, 2, 2, 2)}
    return _create_preactresnet("preactresnet18", pretrained, **(model_args | kwargs))


@register_model
def preactresnet34(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-34."""
    model_args = {"block": PreActBasicBlock, "layers": (3, 4, 6, 3)}
    return _create_preactresnet("preactresnet34", pretrained, **(model_args | kwargs))


@register_model
def preactresnet50(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-50, of bottleneck blocks."""
    model_args = {"block": PreActBottleneck, "layers": (3, 4, 6, 3)}
    return _create_preactresnet("preactresnet50", pretrained, **(model_args | kwargs))
