"""Opens published models in a fresh process, every way there is: ``hub_loads.py FOLDER OWNER/NAME...``.

The classifiers' logits go to FOLDER/OWNER/NAME/logits.pt. The code blocks of the cards are run as they stand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline


def code_blocks(name: str) -> list[str]:
    """The Python in the card."""
    card = Path(hf_hub_download(name, "README.md")).read_text()
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


folder = Path(sys.argv[1])
image = Image.effect_noise((32, 32), 80).convert("RGB")
image.save("image.png")
for name in sys.argv[2:]:
    blocks = code_blocks(name)
    assert len(blocks) == 2, blocks
    variables: dict[str, object] = {}
    for block in blocks:  # the first imports what registers the architecture
        exec(block, variables)
    inputs = torch.ones(2, 3, 32, 32)
    by_timm = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
    by_transformers = AutoModelForImageClassification.from_pretrained(name).eval()
    pixels = AutoImageProcessor.from_pretrained(name)(image)["pixel_values"]
    with torch.no_grad():
        found = {
            "timm": by_timm(inputs),
            "transformers": by_transformers(inputs).logits,
            "scores of timm": variables["probabilities"],
            "scores of transformers": by_transformers(pixels).logits.softmax(1),
        }
    names = by_timm.pretrained_cfg["label_names"]
    found["names"] = (names, list(by_transformers.config.id2label.values()))
    best = pipeline("image-classification", model=name)(image, top_k=len(names))
    found["scores of the pipeline"] = torch.tensor([[{b["label"]: b["score"] for b in best}[n] for n in names]])
    found["data"] = timm.data.resolve_model_data_config(by_timm)
    (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save(found, folder / name / "logits.pt")

(block,) = code_blocks("ann/adapted")
adapted: dict[str, Any] = {}
exec(block, adapted)
torch.save(adapted["model"].eval()(torch.arange(8)[None]).logits.detach(), folder / "ann" / "adapted" / "logits.pt")
