"""What the architectures have in common: stem, stages, final norm and head behind timm's model contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers.classifier import ClassifierHead
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

# Builds a residual block from its input channels, output channels, stride and drop path rate.
BlockFactory = Callable[[int, int, int, float], nn.Module]
FeatureInfo = list[dict[str, Any]]


def cifar_cfg(*, pool_size: int, first_conv: str = "stem") -> dict[str, Any]:
    """Pretrained config for 32x32 inputs and ten classes, with the channel statistics of CIFAR-10."""
    return {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "pool_size": (pool_size, pool_size),
        "crop_pct": 1.0,
        "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
        "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
        "first_conv": first_conv,
        "classifier": "head.fc",
        "license": "mit",
    }


def residual_stages(
    block: BlockFactory, in_chs: int, widths: Sequence[Sequence[int]], drop_path_rate: float
) -> tuple[nn.Sequential, FeatureInfo]:
    """Stack residual blocks into stages; every stage but the first halves the resolution in its first block.

    Args:
        block: Builds one block.
        in_chs: Channels that enter the first block.
        widths: Output channels of every block, stage by stage.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 at the first
            (https://arxiv.org/abs/1603.09382).

    Returns:
        The stages, and timm's `feature_info` with one entry for each of them.
    """
    last = sum(len(stage_widths) for stage_widths in widths) - 1
    stages, feature_info, index = nn.Sequential(), [], 0
    for stage_index, stage_widths in enumerate(widths):
        stage = nn.Sequential()
        for block_index, out_chs in enumerate(stage_widths):
            stride = 2 if stage_index > 0 and block_index == 0 else 1
            stage.append(block(in_chs, out_chs, stride, drop_path_rate * index / max(last, 1)))
            in_chs, index = out_chs, index + 1
        stages.append(stage)
        name = f"stages.{stage_index}"
        feature_info.append({"num_chs": in_chs, "reduction": 2**stage_index, "module": name})
    return stages, feature_info


def check_layers(layers: Sequence[int], num_stages: int) -> None:
    """Raise ValueError unless `layers` are `num_stages` positive block counts."""
    if len(layers) != num_stages or min(layers) < 1:
        raise ValueError(f"layers={layers!r}: give {num_stages} block counts, one per stage, each at least 1")


def check_width(width: int) -> None:
    """Raise ValueError unless `width` is positive."""
    if width < 1:
        raise ValueError(f"width={width!r}: give at least 1")


def bn_relu(channels: int, **dd: Any) -> nn.Sequential:
    """BatchNorm and ReLU, the norm after the last block of a pre-activation network."""
    # Not timm's fused BatchNormAct2d: torch's convert_sync_batchnorm would drop the activation inside it.
    return nn.Sequential(nn.BatchNorm2d(channels, **dd), nn.ReLU(inplace=True))


class StagedNet(nn.Module):
    """A convolutional classifier made of `stem`, `stages`, `norm`, `pre_logits` and `head`.

    Images are `(B, in_chans, H, W)`, logits `(B, num_classes)`. As in the AMP paper's experiments, weights of
    convolutions start Kaiming-normal with fan-out, biases of linear layers at zero, and all else at PyTorch's
    default (BatchNorm at weight 1 and bias 0).

    Args:
        stem: Everything before the first stage.
        stages: One Sequential of blocks per stage.
        feature_info: timm's description of the stage outputs (channels, reduction, module name).
        norm: What follows the last stage; nothing by default.
        pre_logits: Layers between the features and the pooled head, `(B, C, H, W)` in and out.
        head_features: Channels that leave `pre_logits`, where they are not those of the last stage.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: timm's name of the pooling: 'avg', 'max', 'avgmax', 'catavgmax', '' for none.
        drop_rate: Dropout rate before the classifier.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If there are classes but no pooling.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: nn.Sequential,
        feature_info: FeatureInfo,
        *,
        norm: nn.Module | None = None,
        pre_logits: nn.Module | None = None,
        head_features: int | None = None,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.feature_info = feature_info
        self.num_features: int = feature_info[-1]["num_chs"]
        self.grad_checkpointing = False

        self.stem = stem
        self.stages = stages
        self.norm = nn.Identity() if norm is None else norm
        self.pre_logits = nn.Identity() if pre_logits is None else pre_logits
        self.apply(_init_weights)
        head_features = self.num_features if head_features is None else head_features
        self._set_head(head_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)

    def _set_head(
        self,
        in_features: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        **dd: Any,
    ) -> None:
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"num_classes={num_classes} with global_pool={global_pool!r}: a classifier needs pooled "
                "features; choose a pooling such as 'avg', or num_classes=0"
            )
        self.num_classes = num_classes
        self.head = ClassifierHead(in_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head.apply(_init_weights)
        self.head.train(self.training)
        self.head_hidden_size = in_features * self.head.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, an Identity if there are no classes."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling to change to; the present one if None.

        Raises:
            ValueError: If there are classes but no pooling.
        """
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        weight = next(self.stem.parameters())
        dd = {"device": weight.device, "dtype": weight.dtype}
        self._set_head(self.head.in_features, num_classes, global_pool, self.head.drop.p, **dd)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of the parameters: stem, stages (`coarse`) or blocks, and the head last."""
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations.

        Gradients do not change. BatchNorm sees every batch twice, so its running statistics move twice.
        """
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward through the features, keeping the outputs of stages.

        Args:
            x: Images `(B, in_chans, H, W)`.
            indices: The last n stages if int, all if None, else the stages of these indices.
            norm: Whether the final norm applies to the last stage's output.
            stop_early: Whether to stop after the last stage asked for.
            output_fmt: Format of the intermediates; 'NCHW' is the only one.
            intermediates_only: Whether to return the intermediates alone.

        Returns:
            The final features and the list of intermediates, or that list alone.

        Raises:
            ValueError: If `output_fmt` is not 'NCHW'.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        last = len(self.stages) - 1
        for index, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = self._forward_stage(stage, x)
            normed = self.norm(x) if index == last else x
            if index in take_indices:
                intermediates.append(normed if norm else x)
            x = normed
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: The last n stages if int, else the stages of these indices.
            prune_norm: Whether to remove the final norm even if the last stage stays.
            prune_head: Whether to remove the head even if the last stage stays.

        Returns:
            The indices of the stages asked for.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.pre_logits = nn.Identity()
            self._set_head(self.num_features, 0, "", self.head.drop.p)
        return list(take_indices)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(B, in_chans, H, W)` to features `(B, num_features, H', W')`."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._forward_stage(stage, x)
        x = self.norm(x)
        return x

    def _forward_stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits, or to the `(B, head_hidden_size)` input of the classifier if `pre_logits`."""
        x = self.head(self.pre_logits(x), pre_logits=pre_logits)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(B, in_chans, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
