"""VGG-16 with BatchNorm for small images.

Simonyan, Zisserman. *Very Deep Convolutional Networks for Large-Scale Image Recognition*. ICLR 2015,
https://arxiv.org/abs/1409.1556
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from amp_plugin.models.staged import StagedNet, check_width, cifar_cfg

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
    """VGG's two fully connected layers, at every position: `(B, C, H, W)` to `(B, hidden_features, H, W)`.

    Args:
        in_features: Input channels.
        hidden_features: Width of both layers.
        drop_rate: Dropout rate between them.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, in_features: int, hidden_features: int, drop_rate: float, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, **dd)
        self.fc2 = nn.Linear(hidden_features, hidden_features, **dd)
        self.act = nn.ReLU(inplace=True)
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
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout rate after each of the two wide linear layers.
        conv_drop_rate: Dropout rate after each convolution.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `width` is not positive, or there are classes but no pooling.
    """

    def __init__(
        self,
        width: int = 64,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        conv_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_width(width)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # The first convolution is the stem.
        stages, feature_info, in_chs = nn.Sequential(), [], width
        for index, (depth, factor) in enumerate(zip((2, 2, 3, 3, 3), (1, 2, 4, 8, 8), strict=True)):
            stage = nn.Sequential()
            for _ in range(depth - 1 if index == 0 else depth):
                stage.append(_conv_bn_relu(in_chs, factor * width, conv_drop_rate, **dd))
                in_chs = factor * width
            stages.append(stage.append(nn.MaxPool2d(2)))
            name = f"stages.{index}"
            feature_info.append({"num_chs": in_chs, "reduction": 2 ** (index + 1), "module": name})
        hidden_features = 64 * width
        super().__init__(
            stem=_conv_bn_relu(in_chans, width, conv_drop_rate, **dd),
            stages=stages,
            feature_info=feature_info,
            pre_logits=PreLogits(in_chs, hidden_features, drop_rate, **dd),
            head_features=hidden_features,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


default_cfgs = generate_default_cfgs({"cifar_vgg16": cifar_cfg(pool_size=1, first_conv="stem.conv")})


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16 with BatchNorm: 33.65M parameters."""
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(CifarVGG, "cifar_vgg16", pretrained, feature_cfg=feature_cfg, **kwargs)
