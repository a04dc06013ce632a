"""Wide ResNet for small images.

Zagoruyko, Komodakis. *Wide Residual Networks*. BMVC 2016, https://arxiv.org/abs/1605.07146
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amp_plugin.models.preactresnet import PreActBasicBlock
from amp_plugin.models.residual import ResidualNet
from amp_plugin.models.staged import check_layers, check_width, register_variants

__all__ = ["WideResNet"]


class WideResNet(ResidualNet):
    """Wide ResNet: three stages of pre-activation basic blocks without biases.

    Args:
        layers: Number of blocks in each of the three stages; WRN-d has (d - 4) / 6.
        width: Widening factor; the stages have 16, 32 and 64 times as many channels.
        **options: Further arguments of `ResidualNet`; the paper's dropout (section 2.4) is `conv_drop_rate`.

    Raises:
        ValueError: If `layers` are not three positive counts, `width` is not positive, or there are
            classes but no pooling.
    """

    num_stages = 3

    def __init__(self, layers: Sequence[int] = (4, 4, 4), width: int = 10, **options: Any) -> None:
        check_layers(layers, 3)
        check_width(width)
        widths = [[16 * 2**stage * width] * depth for stage, depth in enumerate(layers)]
        super().__init__(PreActBasicBlock, 16, widths, **options)


register_variants(WideResNet, {"wrn28_10": {}}, pool_size=8, first_conv="stem")  # 36.48M parameters
