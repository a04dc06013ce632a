"""A timm architecture as a transformers image classifier, to be trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import logging

from amp_plugin.suggest import did_you_mean


def image_classifier(
    architecture: str,
    class_names: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int] = 32,
    **model_args: Any,
) -> TimmWrapperForImageClassification:
    """Build any registered timm architecture with timm's own initial weights.

    A folder that `save_pretrained` wrote opens with `AutoModelForImageClassification`, `AutoImageProcessor`,
    `pipeline("image-classification")` and `timm.create_model("local-dir:FOLDER", pretrained=True)` after
    ``import amp_plugin``; timm also takes another `num_classes` and `in_chans`.

    Args:
        architecture: timm's name, e.g. ``preactresnet18``.
        class_names: names of the classes, in the order of the labels.
        mean: means of the channels, of pixels in [0, 1]; the saved image processor has them.
        std: standard deviations of the channels, of pixels in [0, 1].
        image_size: side of the images in pixels, or (height, width).
        **model_args: arguments of the architecture, e.g. ``width=16``.

    Raises:
        ValueError: timm has no such architecture (the message tells near ones), or the architecture refuses an
            argument, or does not take these images.
    """
    if not timm.is_model(architecture):
        near = did_you_mean(architecture.lower(), timm.list_models(), at_most=3)
        raise ValueError(f"model {architecture!r} is unknown to timm{near}; timm.list_models() lists them")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if getattr(timm.get_pretrained_cfg(architecture), "fixed_input_size", False):
        model_args.setdefault("img_size", [height, width])  # it would be made for the images of its checkpoints
    try:
        initial = timm.create_model(architecture, num_classes=len(class_names), **model_args)
    except Exception as error:  # each architecture fails in its own way
        raise ValueError(f"model {architecture!r} does not take these arguments: {_in_words(error)}") from error
    _check_images(initial, architecture, len(class_names), height, width)
    settings: dict[str, Any] = {
        "architecture": architecture,
        "model_args": model_args,
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "mean": list(mean),
            "std": list(std),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            **adaptable_layers(initial),
        },
    }
    config = TimmWrapperConfig(**settings)
    # A wrapper that loads timm's weights saves them under timm's names again; one made from a configuration alone
    # redraws them, and saves them under names that timm cannot read.
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = TimmWrapperForImageClassification.from_pretrained(
            None, config=config, state_dict=initial.state_dict(), dtype="auto"
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    config.name_or_path = ""  # transformers has put "None" there
    model.train()
    return model


def adaptable_layers(model: Any) -> dict[str, Any]:
    """Return the part of timm's `pretrained_cfg` that names the layers to adapt to other classes and other channels."""
    return {key: model.pretrained_cfg[key] for key in ("classifier", "first_conv") if model.pretrained_cfg.get(key)}


def _check_images(model: nn.Module, architecture: str, classes: int, height: int, width: int) -> None:
    """Raise a ValueError if the model does not make one logit for each class of an image of this size."""
    training = model.training
    images = torch.zeros(1, 3, height, width, device=next(model.parameters()).device)
    advice = "choose another image size, or arguments of the architecture that fit it"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model.eval()(images)
    except Exception as error:  # each architecture fails in its own way
        raise ValueError(
            f"model {architecture!r} does not take images of {height} x {width} pixels with three channels:"
            f" {_in_words(error)}; {advice}"
        ) from error
    finally:
        model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        raise ValueError(f"model {architecture!r} does not make {classes} logits of an image with these arguments")


def _in_words(error: Exception) -> str:
    return f"{' '.join(str(error).split())}" or type(error).__name__
