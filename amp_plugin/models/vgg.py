"""VGG-16 with BatchNorm for small images.

Simonyan, Zisserman. *Very Deep Convolutional Networks for Large-Scale Image Recognition*. ICLR 2015,
https://arxiv.org/abs/1409.1556
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from amp_plugin.models.staged import Stage, StagedNet, check_width, register_variants

__all__ = ["CifarVGG"]


def _conv_bn_relu(in_chs: int, out_chs: int, conv_drop_rate: float, **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_chs, out_chs, 3, padding=1, **dd),
            bn=nn.BatchNorm2d(out_chs, **dd),
            act=nn.ReLU(inplace=True),
            drop=nn.Dropout(conv_drop_rate),
        )
    )


class PreLogits(nn.Module):
    """VGG's two fully connected layers, at every position: `(B, C, H, W)` to `(B, hidden_features, H, W)`."""

    def __init__(self, in_features: int, hidden_features: int, drop_rate: float, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, **dd)
        self.fc2 = nn.Linear(hidden_features, hidden_features, **dd)
        self.act = nn.ReLU()  # in place, it fails in TorchScript: a linear layer there returns a view of a leaf
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply both layers along the channels."""
        x = x.permute(0, 2, 3, 1)
        x = self.drop(self.act(self.fc1(x)))
        x = self.act(self.fc2(x))
        return x.permute(0, 3, 1, 2)


class CifarVGG(StagedNet):
    """VGG-16 with BatchNorm: five stages that end in max pooling, and two wide linear layers in the head.

    A 32x32 image reaches the linear layers as one position, so nothing is left to pool. Of a larger image
    they see several positions, whose results are pooled (timm's way). A side below 32 is an error.

    Args:
        width: Channels of the first stage; the others have 2, 4, 8 and 8 times, the linear layers 64 times as
            many.
        drop_rate: Dropout rate after each of the two wide linear layers.
        conv_drop_rate: Dropout rate after each convolution.
        in_chans: Number of image channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        **options: `num_classes` and `global_pool` of `StagedNet`.

    Raises:
        ValueError: If `width` is not positive, or there are classes but no pooling.
    """

    num_stages = 5

    def __init__(
        self,
        width: int = 64,
        drop_rate: float = 0.0,
        conv_drop_rate: float = 0.0,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_width(width)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # The first convolution is the stem.
        stages, feature_info, in_chs = nn.Sequential(), [], width
        for index, (depth, factor) in enumerate(zip((1, 2, 3, 3, 3), (1, 2, 4, 8, 8), strict=True)):
            stage = Stage()
            for _ in range(depth):
                stage.append(_conv_bn_relu(in_chs, factor * width, conv_drop_rate, **dd))
                in_chs = factor * width
            stages.append(stage.append(nn.MaxPool2d(2)))
            feature_info.append({"num_chs": in_chs, "reduction": 2 ** (index + 1), "module": f"stages.{index}"})
        super().__init__(
            _conv_bn_relu(in_chans, width, conv_drop_rate, **dd),
            stages,
            feature_info,
            pre_logits=PreLogits(in_chs, 64 * width, drop_rate, **dd),
            head_features=64 * width,
            in_chans=in_chans,
            drop_rate=drop_rate,
            **dd,
            **options,
        )


register_variants(CifarVGG, {"cifar_vgg16": {}}, pool_size=1, first_conv="stem.conv")  # 33.65M parameters
