"""Image checkpoints of timm and Hugging Face to fine-tune, and the images that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperImageProcessor

from amp_plugin.models.classifier import adaptable_layers
from amp_plugin.models.pretrained import PretrainedError, accepts, checkpoint_config, explained, pretrained_classifier


@dataclass(frozen=True)
class ImageCheckpoint:
    """A checkpoint and the images it takes: squares of one size, resized (bicubic) and normalised."""

    name: str  # id on the Hub, or a folder
    image_size: int  # side of the images, in pixels
    mean: tuple[float, float, float]  # means of the channels, of pixels in [0, 1]
    std: tuple[float, float, float]  # standard deviations of the channels, of pixels in [0, 1]
    processor: Any = None  # image processor to save beside the model; None for a timm model
    timm_settings: dict[str, Any] | None = None  # `pretrained_cfg` for the configuration of a timm model

    def classifier(self, class_names: Sequence[str]) -> tuple[PreTrainedModel, list[str]]:
        """Load the model, as `pretrained_classifier` does, and try it on an image of this size."""
        model, new = pretrained_classifier(AutoModelForImageClassification, self.name, class_names)
        refusal = accepts(model, {"pixel_values": torch.zeros(1, 3, self.image_size, self.image_size)})
        if refusal is not None:
            raise PretrainedError(
                f"pretrained {self.name!r} does not take images of {self.image_size} x {self.image_size} pixels"
                f" ({refusal}); leave image_size to the checkpoint"
            )
        if self.timm_settings is not None:
            model.config.pretrained_cfg = adaptable_layers(model.timm_model) | self.timm_settings
        return model, new


def image_checkpoint(name: str, image_size: int | None = None) -> ImageCheckpoint:
    """Look up which images a checkpoint takes; an image size, in pixels, overrules the checkpoint's own.

    The checkpoint is a timm model with pretrained weights (``resnet18.a1_in1k``, ``timm/resnet18.a1_in1k``,
    ``hf-hub:...``), any image classifier on the Hugging Face Hub, or a folder. Its image processor must do no more than
    resize, crop and normalise.
    """
    name = _full_name(name)
    checkpoint_config(AutoModelForImageClassification, name)
    with explained(name):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    timms = isinstance(processor, TimmWrapperImageProcessor)
    if timms:
        side = image_size or _side(name, *processor.data_config["input_size"][1:])
        mean, std = processor.data_config["mean"], processor.data_config["std"]
        settings = {"input_size": (3, side, side), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
        candidates = [TimmWrapperImageProcessor({**processor.data_config, **settings})]
    else:
        known = processor.to_dict()
        size = known.get("crop_size" if known.get("do_center_crop") else "size") or {}
        shortest = size.get("shortest_edge")
        side = image_size or _side(name, size.get("height", shortest), size.get("width", shortest))
        normalised = known.get("do_normalize") and known.get("image_mean") and known.get("image_std")
        mean, std = (known["image_mean"], known["image_std"]) if normalised else ((0.0,) * 3, (1.0,) * 3)
        settings = {"resample": Image.Resampling.BICUBIC, "do_center_crop": False, "crop_pct": 1.0}
        settings["trust_remote_code"] = False
        sizes = ({"height": side, "width": side}, {"shortest_edge": side})
        candidates = [AutoImageProcessor.from_pretrained(name, size=size, **settings) for size in sizes]
    for candidate in candidates:
        if _only_normalises(candidate, side, mean, std):
            saved = {"timm_settings": candidate.data_config} if timms else {"processor": candidate}
            return ImageCheckpoint(name, side, tuple(mean), tuple(std), **saved)
    raise PretrainedError(
        f"pretrained {name!r}: its {type(processor).__name__} does more to an image than resize, crop and normalise,"
        " so images cannot be prepared as it expects; choose another checkpoint"
    )


def _full_name(name: str) -> str:
    """Turn timm's names of weights into their id on the Hub."""
    for prefix in ("hf-hub:", "hf_hub:"):
        name = name.removeprefix(prefix)
    if "/" in name or not timm.is_model(name):
        return name
    weights = timm.get_pretrained_cfg(name)
    if weights is None or not weights.hf_hub_id:
        raise PretrainedError(
            f"pretrained {name!r}: timm has no weights for this architecture; --model {name} trains it from scratch"
        )
    return str(weights.hf_hub_id)


def _side(name: str, height: int | None, width: int | None) -> int:
    if height is None or height != width:
        raise PretrainedError(f"pretrained {name!r} takes images of {height} x {width} pixels; name one image_size")
    return height


def _only_normalises(processor: Any, side: int, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Say whether the processor merely normalises an image of the right size."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    try:
        got = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    except Exception:  # processors raise what they like at a kind of size that they do not know
        return False
    expected = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
    return got.shape == (3, side, side) and torch.allclose(got, expected.permute(2, 0, 1), atol=1e-4)
