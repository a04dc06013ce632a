"""Wide ResNet for small images.

Zagoruyko, Komodakis. *Wide Residual Networks*. BMVC 2016, https://arxiv.org/abs/1605.07146
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from amp_plugin.models.preactresnet import PreActBasicBlock
from amp_plugin.models.staged import StagedNet, bn_relu, check_layers, check_width, cifar_cfg, residual_stages

__all__ = ["WideResNet"]


class WideResNet(StagedNet):
    """Wide ResNet: three stages of pre-activation basic blocks without biases, for images of 32x32 or larger.

    Args:
        layers: Number of blocks in each of the three stages; WRN-d has (d - 4) / 6.
        width: Widening factor; the stages have 16, 32 and 64 times as many channels.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout rate before the classifier.
        conv_drop_rate: Dropout rate between the two convolutions of each block (paper, section 2.4).
        drop_path_rate: Stochastic depth rate of the last block.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `layers` are not three positive counts, `width` is not positive, or there are
            classes but no pooling.
    """

    def __init__(
        self,
        layers: Sequence[int] = (4, 4, 4),
        width: int = 10,
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
        check_width(width)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stem_chs = 16
        widths = [[stem_chs * 2**stage * width] * depth for stage, depth in enumerate(layers)]
        make_block = partial(PreActBasicBlock, bias=False, conv_drop_rate=conv_drop_rate, **dd)
        stages, feature_info = residual_stages(make_block, stem_chs, widths, drop_path_rate)
        super().__init__(
            stem=nn.Conv2d(in_chans, stem_chs, 3, padding=1, bias=False, **dd),
            stages=stages,
            feature_info=feature_info,
            norm=bn_relu(widths[-1][-1], **dd),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _create_wide_resnet(variant: str, pretrained: bool, **kwargs: Any) -> WideResNet:
    feature_cfg = {"out_indices": (0, 1, 2), "flatten_sequential": True}
    return build_model_with_cfg(WideResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs({"wrn28_10": cifar_cfg(pool_size=8)})


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WideResNet-28-10: 36.48M parameters."""
    model_args = {"layers": (4, 4, 4), "width": 10}
    return _create_wide_resnet("wrn28_10", pretrained, **(model_args | kwargs))
