"""PyramidNet with additive widening, for small images.

Han, Kim, Kim. *Deep Pyramidal Residual Networks*. CVPR 2017, https://arxiv.org/abs/1610.02915
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from amp_plugin.models.staged import StagedNet, bn_relu, check_layers, cifar_cfg, residual_stages

__all__ = ["PyramidBasicBlock", "PyramidBottleneck", "PyramidNet"]


class PyramidShortcut(nn.Module):
    """A shortcut without parameters: `(B, C, H, W)`, halved by average pooling if striding, zero-padded in C.

    Args:
        new_chs: Number of zero channels to append.
        stride: Stride, 1 or 2.
    """

    def __init__(self, new_chs: int, stride: int) -> None:
        super().__init__()
        self.new_chs = new_chs
        # An odd side rounds up, as in a strided convolution with padding.
        self.pool = nn.AvgPool2d(2, stride=2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool and pad."""
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_chs))


class PyramidBasicBlock(nn.Module):
    """Two 3x3 convolutions around one ReLU, with BatchNorm before, between and after.

    Features `(B, in_chs, H, W)` become `(B, out_chs, H', W')`.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the first convolution, 1 or 2.
        drop_path_rate: Probability of dropping the residual branch.
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
        conv_drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(out_chs, **dd)
        self.shortcut = PyramidShortcut(out_chs - in_chs, stride)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(conv_drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the residual to the shortcut."""
        shortcut: torch.Tensor = self.shortcut(x)
        x = self.conv1(self.bn1(x))
        x = self.conv2(self.drop(self.act(self.bn2(x))))
        x = self.drop_path(self.bn3(x))
        return x + shortcut


class PyramidBottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions around two ReLUs, with BatchNorm before, between and after.

    Shapes and arguments are those of `PyramidBasicBlock`; the inner width is `out_chs // 4`.
    """

    expansion = 4

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_path_rate: float,
        *,
        conv_drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        mid_chs = out_chs // self.expansion
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(mid_chs, **dd)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.bn4 = nn.BatchNorm2d(out_chs, **dd)
        self.shortcut = PyramidShortcut(out_chs - in_chs, stride)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(conv_drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the residual to the shortcut."""
        shortcut: torch.Tensor = self.shortcut(x)
        x = self.conv1(self.bn1(x))
        x = self.conv2(self.act(self.bn2(x)))
        x = self.conv3(self.drop(self.act(self.bn3(x))))
        x = self.drop_path(self.bn4(x))
        return x + shortcut


class PyramidNet(StagedNet):
    """PyramidNet: every block is a little wider than the one before; for images of 32x32 or larger.

    Block k of n (counted from 1) has `round(16 + alpha * k / n)` channels, times 4 in a bottleneck.

    Args:
        block: Type of the blocks.
        layers: Number of blocks in each of the three stages.
        alpha: Widening factor: how many channels the blocks add to the 16 of the stem.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout rate before the classifier.
        conv_drop_rate: Dropout rate before the last convolution of each block.
        drop_path_rate: Stochastic depth rate of the last block.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `layers` are not three positive counts, `alpha` is negative, or there are classes but
            no pooling.
    """

    def __init__(
        self,
        block: type[PyramidBasicBlock] | type[PyramidBottleneck] = PyramidBasicBlock,
        layers: Sequence[int] = (18, 18, 18),
        alpha: float = 48,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        conv_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_layers(layers, 3)
        if alpha < 0:
            raise ValueError(f"alpha={alpha!r}: give at least 0; blocks can only widen")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stem_chs, index = 16, count(1)
        widths = [
            [block.expansion * round(stem_chs + alpha * next(index) / sum(layers)) for _ in range(depth)]
            for depth in layers
        ]
        make_block = partial(block, conv_drop_rate=conv_drop_rate, **dd)
        stages, feature_info = residual_stages(make_block, stem_chs, widths, drop_path_rate)
        super().__init__(
            stem=nn.Sequential(
                nn.Conv2d(in_chans, stem_chs, 3, padding=1, bias=False, **dd), nn.BatchNorm2d(stem_chs, **dd)
            ),
            stages=stages,
            feature_info=feature_info,
            norm=bn_relu(widths[-1][-1], **dd),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _create_pyramidnet(variant: str, pretrained: bool, **kwargs: Any) -> PyramidNet:
    feature_cfg = {"out_indices": (0, 1, 2), "flatten_sequential": True}
    return build_model_with_cfg(PyramidNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        name: cifar_cfg(pool_size=8, first_conv="stem.0")
        for name in (
            "pyramidnet110_48",
            "pyramidnet110_84",
            "pyramidnet110_270",
            "pyramidnet164_48",
            "pyramidnet164_270",
        )
    }
)


@register_model
def pyramidnet110_48(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """PyramidNet-110, alpha 48: 1.77M parameters."""
    model_args = {"block": PyramidBasicBlock, "alpha": 48}
    return _create_pyramidnet("pyramidnet110_48", pretrained, **(model_args | kwargs))


@register_model
def pyramidnet110_84(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """PyramidNet-110, alpha 84."""
    model_args = {"block": PyramidBasicBlock, "alpha": 84}
    return _create_pyramidnet("pyramidnet110_84", pretrained, **(model_args | kwargs))


@register_model
def pyramidnet110_270(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """PyramidNet-110, alpha 270: 28.49M parameters."""
    model_args = {"block": PyramidBasicBlock, "alpha": 270}
    return _create_pyramidnet("pyramidnet110_270", pretrained, **(model_args | kwargs))


@register_model
def pyramidnet164_48(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """PyramidNet-164, alpha 48, of bottleneck blocks."""
    model_args = {"block": PyramidBottleneck, "alpha": 48}
    return _create_pyramidnet("pyramidnet164_48", pretrained, **(model_args | kwargs))


@register_model
def pyramidnet164_270(pretrained: bool = False, **kwargs: Any) -> PyramidNet:
    """PyramidNet-164, alpha 270, of bottleneck blocks: 27.22M parameters."""
    model_args = {"block": PyramidBottleneck, "alpha": 270}
    return _create_pyramidnet("pyramidnet164_270", pretrained, **(model_args | kwargs))
