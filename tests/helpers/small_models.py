"""Small networks of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import amp_plugin.models  # noqa: F401  (registers the architectures)

# There is one small network for every kind of block. The depths differ from stage to stage.
SMALL: dict[str, dict[str, Any]] = {
    "preactresnet18": {"width": 8, "layers": (1, 2, 1, 1)},
    "preactresnet50": {"width": 4, "layers": (1, 2, 1, 1)},
    "pyramidnet110_48": {"alpha": 10, "layers": (2, 3, 1)},
    "pyramidnet164_48": {"alpha": 10, "layers": (2, 3, 1)},
    "wrn28_10": {"width": 2, "layers": (1, 2, 1)},
    "cifar_vgg16": {"width": 4},
}
RESIDUAL = [name for name in SMALL if name != "cifar_vgg16"]
every_small = pytest.mark.parametrize("name", SMALL)


def small(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL[name] | kwargs))


def images(batch_size: int = 3, chans: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(batch_size, chans, *size, generator=torch.Generator().manual_seed(1))
