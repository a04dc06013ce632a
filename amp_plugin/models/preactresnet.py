"""Pre-activation ResNet for small images.

He, Zhang, Ren, Sun. *Identity Mappings in Deep Residual Networks*. ECCV 2016, https://arxiv.org/abs/1603.05027
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from amp_plugin.models.residual import ResidualBlock, ResidualNet
from amp_plugin.models.staged import check_layers, check_width, register_variants

__all__ = [
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActResNet",
    "ReleasedPreActBasicBlock",
    "ReleasedPreActBottleneck",
]


class PreActBasicBlock(ResidualBlock):
    """Two 3x3 convolutions, each after BatchNorm and ReLU.

    A block that changes the shape projects its first pre-activation to the shortcut with a 1x1 convolution;
    any other block adds its input as it is.
    """

    def _make_shortcut(self, in_chs: int, out_chs: int, stride: int, *, bias: bool, **dd: Any) -> nn.Module | None:
        if stride == 1 and in_chs == out_chs:
            return None
        return nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=bias, **dd)


class PreActBottleneck(PreActBasicBlock):
    """1x1 (strided), 3x3 and 1x1 convolutions, each after BatchNorm and ReLU."""

    expansion = 4


class ReleasedPreActBasicBlock(PreActBasicBlock):
    """The basic block of the code released with AMP: every shortcut starts at the first pre-activation."""

    identity_after_act = True


class ReleasedPreActBottleneck(PreActBottleneck):
    """The bottleneck of the code released with AMP: every shortcut starts at the first pre-activation."""

    identity_after_act = True


_RELEASED: dict[type[ResidualBlock], type[ResidualBlock]] = {
    PreActBasicBlock: ReleasedPreActBasicBlock,
    PreActBottleneck: ReleasedPreActBottleneck,
}


class PreActResNet(ResidualNet):
    """Pre-activation ResNet: a 3x3 stem without pooling and four stages.

    Every convolution but the stem has a bias, as in the code released with AMP.

    Args:
        block: Type of the blocks.
        layers: Number of blocks in each of the four stages.
        width: Channels of the stem and inner channels of the first stage; they double from stage to stage.
        as_released: Whether to build the network of the code released with AMP (github.com/hiyouga/AMP-Regularizer,
            models/preresnet.py), which made the AMP paper's tables. It has the same parameters, but each of its
            identity shortcuts adds the pre-activation, where He et al. add the block's input.
        **options: Further arguments of `ResidualNet`.

    Raises:
        ValueError: If `layers` are not four positive counts, `width` is not positive, or there are
            classes but no pooling, or `as_released` comes with a block of another kind.
    """

    num_stages = 4

    def __init__(
        self,
        block: type[ResidualBlock] = PreActBasicBlock,
        layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        as_released: bool = False,
        **options: Any,
    ) -> None:
        check_layers(layers, 4)
        check_width(width)
        if as_released:
            if block not in _RELEASED:
                raise ValueError(f"as_released=True: there is no released form of {block.__name__}; leave it out")
            block = _RELEASED[block]
        widths = [[width * 2**stage * block.expansion] * depth for stage, depth in enumerate(layers)]
        super().__init__(block, width, widths, bias=True, **options)


register_variants(
    PreActResNet,
    {
        "preactresnet18": {"layers": (2, 2, 2, 2)},  # the network of most of the AMP paper's tables: 11.18M parameters
        "preactresnet34": {"layers": (3, 4, 6, 3)},
        "preactresnet50": {"block": PreActBottleneck, "layers": (3, 4, 6, 3)},
    },
    pool_size=4,
    first_conv="stem",
)
