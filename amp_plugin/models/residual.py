"""Residual networks of which every convolution follows a BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import nn

from amp_plugin.models.staged import StagedNet


class ResidualBlock(nn.Module):
    """Convolutions, each after BatchNorm and ReLU, beside a shortcut: `(B, in_chs, H, W)` to `(B, out_chs, H', W')`.

    The layers are `bn1`, `conv1`, `bn2`, `conv2` and so on; all but the last convolution have `out_chs // expansion`
    channels. Dropout comes before the last convolution, and stochastic depth drops the whole residual branch.
    """

    expansion = 1  # ratio of the output channels to the inner channels
    kernels: tuple[int, ...] = (3, 3)  # kernel sizes of the convolutions
    strided = 0  # index of the convolution that has the stride
    first_act = True  # whether a ReLU follows the first BatchNorm; the shortcut starts there if so, else at the input
    last_norm = False  # whether a BatchNorm follows the last convolution
    bn1: nn.Module
    conv1: nn.Module

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
        chs = in_chs
        for index, kernel in enumerate(self.kernels):
            last = index == len(self.kernels) - 1
            next_chs = out_chs if last else out_chs // self.expansion
            conv_stride = stride if index == self.strided else 1
            conv = nn.Conv2d(chs, next_chs, kernel, conv_stride, padding=kernel // 2, bias=bias, **dd)
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(chs, **dd))
            self.add_module(f"conv{index + 1}", conv)
            chs = next_chs
        if self.last_norm:
            self.add_module(f"bn{len(self.kernels) + 1}", nn.BatchNorm2d(out_chs, **dd))
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
        shortcut = x if self.shortcut is None else self.shortcut(preact if self.first_act else x)
        x = self.conv1(preact)
        for number in range(2, len(self.kernels) + 1):
            x = self.act(getattr(self, f"bn{number}")(x))
            if number == len(self.kernels):
                x = self.drop(x)
            x = getattr(self, f"conv{number}")(x)
        if self.last_norm:
            x = getattr(self, f"bn{len(self.kernels) + 1}")(x)
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
            stage = nn.Sequential()
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
