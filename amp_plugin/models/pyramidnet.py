"""PyramidNet with additive widening, for small images.

Han, Kim, Kim. *Deep Pyramidal Residual Networks*. CVPR 2017, https://arxiv.org/abs/1610.02915
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from amp_plugin.models.residual import ResidualBlock, ResidualNet
from amp_plugin.models.staged import check_layers, register_variants

__all__ = ["PyramidBasicBlock", "PyramidBottleneck", "PyramidNet"]


class PyramidShortcut(nn.Module):
    """A shortcut without parameters: `(B, C, H, W)`, halved by average pooling at stride 2, with new zero channels."""

    def __init__(self, new_chs: int, stride: int) -> None:
        super().__init__()
        self.new_chs = new_chs
        # An odd side rounds up, as in a strided convolution with padding.
        self.pool = nn.AvgPool2d(2, stride=2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool and pad."""
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_chs))


class PyramidBasicBlock(ResidualBlock):
    """Two 3x3 convolutions around one ReLU, with BatchNorm before, between and after."""

    first_act = projection_after_act = False
    last_norm = True

    def _make_shortcut(self, in_chs: int, out_chs: int, stride: int, **kwargs: Any) -> nn.Module:
        return PyramidShortcut(out_chs - in_chs, stride)


class PyramidBottleneck(PyramidBasicBlock):
    """1x1, 3x3 (strided) and 1x1 convolutions around two ReLUs, with BatchNorm before, between and after."""

    expansion = 4
    strided = 2


class PyramidNet(ResidualNet):
    """PyramidNet: three stages, of which every block is a little wider than the one before.

    Block k of n (counted from 1) has `round(16 + alpha * k / n)` channels, times 4 in a bottleneck.

    Args:
        block: Type of the blocks.
        layers: Number of blocks in each of the three stages.
        alpha: Widening factor: how many channels the blocks add to the 16 of the stem.
        **options: Further arguments of `ResidualNet`.

    Raises:
        ValueError: If `layers` are not three positive counts, `alpha` is negative, or there are classes but
            no pooling.
    """

    num_stages = 3

    def __init__(
        self,
        block: type[ResidualBlock] = PyramidBasicBlock,
        layers: Sequence[int] = (18, 18, 18),
        alpha: float = 48,
        **options: Any,
    ) -> None:
        check_layers(layers, 3)
        if alpha < 0:
            raise ValueError(f"alpha={alpha!r}: give at least 0; blocks can only widen")
        index = count(1)
        widths = [
            [block.expansion * round(16 + alpha * next(index) / sum(layers)) for _ in range(depth)] for depth in layers
        ]
        super().__init__(block, 16, widths, stem_norm=True, **options)


register_variants(
    PyramidNet,
    {
        "pyramidnet110_48": {"alpha": 48},  # 1.77M parameters
        "pyramidnet110_84": {"alpha": 84},
        "pyramidnet110_270": {"alpha": 270},  # 28.49M parameters
        "pyramidnet164_48": {"block": PyramidBottleneck, "alpha": 48},
        "pyramidnet164_270": {"block": PyramidBottleneck, "alpha": 270},  # 27.22M parameters
    },
    pool_size=8,
    first_conv="stem.0",
)
