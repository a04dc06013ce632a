"""The CIFAR architectures of the AMP paper; importing this package registers them with timm."""

from __future__ import annotations

from amp_plugin.models.preactresnet import PreActResNet
from amp_plugin.models.pyramidnet import PyramidNet
from amp_plugin.models.vgg import CifarVGG
from amp_plugin.models.wide_resnet import WideResNet

__all__ = ["CifarVGG", "PreActResNet", "PyramidNet", "WideResNet"]
