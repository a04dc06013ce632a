"""Stem, stages, final norm and head behind timm's model contract, which every architecture here keeps."""

# There is no `from __future__ import annotations`: TorchScript cannot read strings that torch.fx copies from `forward`.
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn


def register_variants(
    architecture: "type[StagedNet]", variants: Mapping[str, Mapping[str, Any]], *, pool_size: int, first_conv: str
) -> None:
    """Register variants of an architecture with timm, for 32x32 images normalised like CIFAR-10, and ten classes.

    The architecture's module gets timm's `default_cfgs` and one function for each variant. `variants` are arguments of
    the architecture by name, and `pool_size` is the height and width of the features of a 32x32 image.
    """
    cfg = {
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
    module: Any = sys.modules[architecture.__module__]
    module.default_cfgs = generate_default_cfgs({name: dict(cfg) for name in variants})
    for name, arguments in variants.items():
        setattr(module, name, register_model(_entrypoint(architecture, name, arguments)))


def _entrypoint(architecture: "type[StagedNet]", name: str, arguments: Mapping[str, Any]) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        feature_cfg = {"out_indices": tuple(range(architecture.num_stages)), "flatten_sequential": True}
        kwargs = {"feature_cfg": feature_cfg, **arguments, **kwargs}
        model: nn.Module = build_model_with_cfg(architecture, name, pretrained, **kwargs)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = architecture.__module__  # timm looks for default_cfgs there
    return create


def check_layers(layers: Sequence[int], num_stages: int) -> None:
    """Raise ValueError unless `layers` are `num_stages` positive block counts."""
    if len(layers) != num_stages or min(layers) < 1:
        raise ValueError(f"layers={layers!r}: give {num_stages} block counts, one per stage, each at least 1")


def check_width(width: int) -> None:
    """Raise ValueError unless `width` is positive."""
    if width < 1:
        raise ValueError(f"width={width!r}: give at least 1")


class Stage(nn.Sequential):
    """Blocks of one resolution, which can be recomputed in the backward pass one by one."""

    __constants__ = ("grad_checkpointing",)
    grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the blocks in turn."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = checkpoint_seq(self, x)
            return x
        for block in self:
            x = block(x)
        return x


class StagedNet(nn.Module):
    """A convolutional classifier made of `stem`, `stages`, `norm`, `pre_logits` and `head`.

    Images are `(B, in_chans, H, W)`, logits `(B, num_classes)`. Weights of convolutions start Kaiming-normal with
    fan-out and biases of linear layers at zero, as in the AMP paper's experiments. All other parameters start at
    PyTorch's default (BatchNorm at weight 1 and bias 0).

    Args:
        stem: Layers before the first stage.
        stages: One `Stage` of blocks per stage.
        feature_info: timm's description of the stage outputs (channels, reduction, module name).
        norm: Layers after the last stage; none by default.
        pre_logits: Layers between the features and the pooled head, `(B, C, H, W)` in and out; none by default.
        head_features: Channels that leave `pre_logits`; the channels of the last stage by default.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        global_pool: timm's name of the pooling: 'avg', 'max', 'avgmax', 'catavgmax', '' for none.
        drop_rate: Dropout rate before the classifier.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If there are classes but no pooling.
    """

    num_stages: int

    def __init__(
        self,
        stem: nn.Module,
        stages: nn.Sequential,
        feature_info: list[dict[str, Any]],
        *,
        norm: nn.Module | None = None,
        pre_logits: nn.Module | None = None,
        head_features: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.feature_info = feature_info
        self.num_features: int = feature_info[-1]["num_chs"]

        self.stem = stem
        self.stages = stages
        self.norm = norm or nn.Identity()
        self.pre_logits = pre_logits or nn.Identity()
        self.apply(_init_weights)
        self._set_head(head_features or self.num_features, num_classes, global_pool, drop_rate, device, dtype)

    def _set_head(
        self, in_features: int, num_classes: int, global_pool: str, drop_rate: float, device: Any, dtype: Any
    ) -> None:
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"num_classes={num_classes} with global_pool={global_pool!r}: a classifier needs pooled "
                "features; choose a pooling such as 'avg', or num_classes=0"
            )
        self.num_classes = num_classes
        self.head = ClassifierHead(in_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head.apply(_init_weights)
        self.head.train(self.training)
        self.head_hidden_size = in_features * self.head.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, an Identity if there are no classes."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (by none for 0 classes), and the pooling if it is given.

        Raises:
            ValueError: If there are classes but no pooling.
        """
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        weight = next(self.stem.parameters())
        self._set_head(self.head.in_features, num_classes, global_pool, self.head.drop.p, weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of the parameters: stem, stages (`coarse`) or blocks, and the head last."""
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations.

        Gradients do not change. BatchNorm sees every batch twice, so its running statistics move twice.
        """
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward through the features and keep the outputs of stages; the arguments are timm's.

        Returns:
            The final features and the list of intermediates, or that list alone if `intermediates_only`.

        Raises:
            ValueError: If `output_fmt` is not 'NCHW'.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates, last = [], len(self.stages) - 1
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            normed = self.norm(x) if index == last else x
            if index in take_indices:
                intermediates.append(normed if norm else x)
            x = normed
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need; the arguments are timm's.

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
            self._set_head(self.num_features, 0, "", self.head.drop.p, None, None)
        return list(take_indices)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(B, in_chans, H, W)` to features `(B, num_features, H', W')`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x)
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
