"""The README's snippets, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amp_plugin.hosts.classifier import image_classifier

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TITLES = ["attach", "stock Trainer", "AMPTrainer", "amp_backward", "closure", "two passes", "timm", "saved run"]


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has before the first snippet: a model, a batch, a data set, and for the last a finished run."""
    monkeypatch.chdir(tmp_path)
    model = image_classifier("preactresnet18", "abcd", mean=[0.5] * 3, std=[0.2] * 3, width=2, layers=(1, 1, 1, 1))
    model.save_pretrained(tmp_path / "runs" / "cifar10_sample-preactresnet18-amp-seed42")
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
    return {
        "classifier": model,
        "model": model.timm_model,
        "images": images,
        "labels": labels,
        "criterion": nn.CrossEntropyLoss(),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=2),
        "dataset": [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)],
        "image": Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)),
    }


def test_every_snippet_is_known() -> None:
    assert len(SNIPPETS) == len(TITLES)


@pytest.mark.parametrize("title", TITLES)
def test_snippet(title: str, namespace: dict[str, Any]) -> None:
    index = TITLES.index(title)
    if title == "two passes":  # goes on with the optimizer of the first
        exec(SNIPPETS[TITLES.index("closure")].split("def closure")[0], namespace)
    if title in ("AMPTrainer", "stock Trainer"):
        namespace["model"] = namespace["classifier"]
    before = [p.detach().clone() for p in namespace["model"].parameters()]
    exec(SNIPPETS[index], namespace)
    if index < TITLES.index("timm"):
        after = list(namespace["model"].parameters())
        assert not all(torch.equal(p, q) for p, q in zip(before, after, strict=True)), "nothing was trained"
