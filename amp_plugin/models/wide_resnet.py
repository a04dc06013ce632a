"""Wide ResNet for small images.

Zagoruyko, Komodakis. *Wide Residual Networks*. BMVC 2016, https://arxiv.org/abs/1605.07146
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amp_plugin.models.preactresnet import PreActBasicBlock
from amp_plugin.models.residual import ResidualNet
from amp_plugin.models.staged import check_layers, check_width, register_variants

__all__ = ["ReleasedWideBasicBlock", "WideResNet"]


class ReleasedWideBasicBlock(PreActBasicBlock):
    """The block of the code released with AMP: its second convolution strides, and its projections take its input."""

    strided = 2
    projection_after_act = False


class WideResNet(ResidualNet):
    """Wide ResNet: three stages of pre-activation basic blocks without biases.

    Args:
        layers: Number of blocks in each of the three stages; WRN-d has (d - 4) / 6.
        width: Widening factor; the stages have 16, 32 and 64 times as many channels.
        as_released: Whether to build the network of the code released with AMP (github.com/hiyouga/AMP-Regularizer,
            models/wide_resnet.py), which made the AMP paper's tables. It has the same parameters, but the second
            convolution of a block has the stride, projections take the block's input before BatchNorm and ReLU, and
            the running statistics of the last BatchNorm have a momentum of 0.9.
        **options: Further arguments of `ResidualNet`; the paper's dropout (section 2.4) is `conv_drop_rate`.

    Raises:
        ValueError: If `layers` are not three positive counts, `width` is not positive, or there are
            classes but no pooling.
    """

    num_stages = 3

    def __init__(
        self, layers: Sequence[int] = (4, 4, 4), width: int = 10, as_released: bool = False, **options: Any
    ) -> None:
        check_layers(layers, 3)
        check_width(width)
        widths = [[16 * 2**stage * width] * depth for stage, depth in enumerate(layers)]
        super().__init__(ReleasedWideBasicBlock if as_released else PreActBasicBlock, 16, widths, **options)
        if as_released:
            last_norm: Any = next(self.norm.children())
            last_norm.momentum = 0.9


register_variants(WideResNet, {"wrn28_10": {}}, pool_size=8, first_conv="stem")  # 36.48M parameters
