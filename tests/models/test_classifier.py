from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL
from transformers import AutoModelForImageClassification

from amp_plugin.models.classifier import image_classifier

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}


def test_the_initial_weights_are_timms() -> None:
    """The wrapper of transformers redraws every convolution from N(0, 0.02) when it is made from a config."""
    torch.manual_seed(0)
    ours = image_classifier("preactresnet18", "abc", width=4, **STATISTICS).timm_model
    torch.manual_seed(0)
    theirs = timm.create_model("preactresnet18", width=4, num_classes=3)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_save_and_open(tmp_path: Path) -> None:
    model = image_classifier("wrn28_10", ("cat", "dog"), image_size=(40, 32), width=1, layers=(1, 1, 1), **STATISTICS)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.id2label == {0: "cat", 1: "dog"}
    assert again.config.pretrained_cfg["input_size"] == [3, 40, 32]
    assert again.config.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    images = torch.randn(2, 3, 40, 32)
    assert torch.equal(again.eval()(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_timm_opens_the_folder_for_other_classes_and_channels(name: str, tmp_path: Path) -> None:
    model = image_classifier(name, "abcd", **SMALL.get(name, {}), **STATISTICS).eval()
    model.save_pretrained(tmp_path)
    layers = timm.get_pretrained_cfg(name)
    trained = model.timm_model.state_dict()

    def opened(**kwargs: Any) -> Any:
        return timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs).eval()

    def differing(model: Any) -> set[str]:
        weights = model.state_dict().items()
        return {key for key, weight in weights if key not in trained or not torch.equal(weight, trained[key])}

    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened()(images), model(images).logits)
    classifier = {f"{layers.classifier}.weight", f"{layers.classifier}.bias"}
    three = opened(num_classes=3)
    assert three(images).shape == (2, 3)
    assert differing(three) == classifier
    three.reset_classifier(5)
    assert three(images).shape == (2, 5)
    grey = opened(in_chans=1)
    assert differing(grey) == {f"{layers.first_conv}.weight"}
    torch.testing.assert_close(grey(images[:, :1]), model(images[:, :1].expand_as(images)).logits, rtol=1e-4, atol=1e-5)
    assert differing(opened(in_chans=2, num_classes=7)) == {f"{layers.first_conv}.weight", *classifier}
    assert not differing(opened(num_classes=0))
    assert opened(num_classes=0, global_pool="")(images).ndim == 4
    if name in SMALL:
        expected = model.timm_model.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(opened(features_only=True)(images), expected, rtol=0, atol=0)


def test_unknown_architectures_and_arguments() -> None:
    with pytest.raises(ValueError, match="model 'preactresnet19' is unknown to timm, did you mean 'preactresnet1"):
        image_classifier("preactresnet19", "ab", **STATISTICS)
    with pytest.raises(ValueError, match=r"'zzzzzz' is unknown to timm; timm.list_models\(\) lists them"):
        image_classifier("zzzzzz", "ab", **STATISTICS)
    with pytest.raises(ValueError, match=r"'preactresnet18' does not take these arguments: .*widht"):
        image_classifier("preactresnet18", "ab", widht=4, **STATISTICS)
