"""Residual networks of which every convolution follows a BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import nn

from amp_plugin.models.staged import Stage, StagedNet


class ResidualBlock(nn.Module):
    """Convolutions, each after BatchNorm and ReLU, beside a shortcut: `(B, in_chs, H, W)` to `(B, out_chs, H', W')`.

    The layers are `bn1`, `conv1`, `bn2`, `conv2` and so on: two 3x3 convolutions, or the 1x1, 3x3 and 1x1 convolutions
    of a bottleneck, of which all but the last have `out_chs // expansion` channels. Dropout comes before the last
    convolution, and stochastic depth drops the whole residual branch.
    """

    __constants__ = ("first_act", "identity_after_act", "projection_after_act")
    expansion = 1  # ratio of the output channels to the inner channels; a block that has one is a bottleneck
    strided = 1  # number of the convolution that has the stride
    first_act = True  # whether a ReLU follows the first BatchNorm
    identity_after_act = (
        False  # whether a shortcut that is the identity starts after that ReLU, or at the block's input
    )
    projection_after_act = True  # whether a shortcut with layers starts after that ReLU, or at the block's input
    last_norm = False  # whether a BatchNorm follows the last convolution

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_path_rate: float,
        *,
        bias: bool = False,
        conv_drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        bottleneck = self.expansion > 1
        inner_chs = out_chs // self.expansion
        kernels = (1, 3, 1) if bottleneck else (3, 3)

        def conv(number: int, in_chs: int, out_chs: int) -> nn.Conv2d:
            kernel, conv_stride = kernels[number - 1], stride if number == self.strided else 1
            return nn.Conv2d(in_chs, out_chs, kernel, conv_stride, padding=kernel // 2, bias=bias, **dd)

        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = conv(1, in_chs, inner_chs)
        self.bn2 = nn.BatchNorm2d(inner_chs, **dd)
        self.conv2 = conv(2, inner_chs, inner_chs)
        self.bn3 = nn.BatchNorm2d(inner_chs, **dd) if bottleneck or self.last_norm else None
        self.conv3 = conv(3, inner_chs, out_chs) if bottleneck else None
        self.bn4 = nn.BatchNorm2d(out_chs, **dd) if bottleneck and self.last_norm else None
        self.shortcut = self._make_shortcut(in_chs, out_chs, stride, bias=bias, **dd)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(conv_drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def _make_shortcut(self, in_chs: int, out_chs: int, stride: int, *, bias: bool, **dd: Any) -> nn.Module | None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the residual to the shortcut."""
        preact = self.bn1(x)
        if self.first_act:
            preact = self.act(preact)
        if self.shortcut is None:
            shortcut = preact if self.identity_after_act else x
        else:
            shortcut = self.shortcut(preact if self.projection_after_act else x)
        x = self.act(self.bn2(self.conv1(preact)))
        x = self.conv2(self.drop(x) if self.conv3 is None else x)
        if self.bn3 is not None:
            x = self.bn3(x)
        if self.conv3 is not None:
            x = self.conv3(self.drop(self.act(x)))
        if self.bn4 is not None:
            x = self.bn4(x)
        x = self.drop_path(x)
        return x + shortcut


class ResidualNet(StagedNet):
    """Stages of residual blocks behind a 3x3 convolution, for images of 32x32 or larger.

    Every stage but the first halves the resolution in its first block.

    Args:
        block: Type of the blocks.
        stem_chs: Channels of the stem.
        widths: Output channels of every block, stage by stage.
        bias: Whether the convolutions of the blocks have biases.
        stem_norm: Whether a BatchNorm follows the stem's convolution.
        conv_drop_rate: Dropout rate before the last convolution of each block.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first
            (https://arxiv.org/abs/1603.09382).
        in_chans: Number of image channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        **options: `num_classes`, `global_pool` and `drop_rate` of `StagedNet`.

    Raises:
        ValueError: If there are classes but no pooling.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        stem_chs: int,
        widths: Sequence[Sequence[int]],
        *,
        bias: bool = False,
        stem_norm: bool = False,
        conv_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        last = sum(map(len, widths)) - 1
        stages, feature_info, index, in_chs = nn.Sequential(), [], 0, stem_chs
        for stage_index, stage_widths in enumerate(widths):
            stage = Stage()
            for block_index, out_chs in enumerate(stage_widths):
                stride = 2 if stage_index > 0 and block_index == 0 else 1
                drop_path = drop_path_rate * index / max(last, 1)
                stage.append(block(in_chs, out_chs, stride, drop_path, bias=bias, conv_drop_rate=conv_drop_rate, **dd))
                in_chs, index = out_chs, index + 1
            stages.append(stage)
            feature_info.append({"num_chs": in_chs, "reduction": 2**stage_index, "module": f"stages.{stage_index}"})
        stem: nn.Module = nn.Conv2d(in_chans, stem_chs, 3, padding=1, bias=False, **dd)
        if stem_norm:
            stem = nn.Sequential(stem, nn.BatchNorm2d(stem_chs, **dd))
        # Not timm's fused BatchNormAct2d: torch's convert_sync_batchnorm would drop the activation inside it.
        norm = nn.Sequential(nn.BatchNorm2d(in_chs, **dd), nn.ReLU(inplace=True))
        super().__init__(stem, stages, feature_info, norm=norm, in_chans=in_chans, **dd, **options)
