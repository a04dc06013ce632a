"""timm's own legacy_train.py, with the four lines of the page changed, in a process of its own.

The wheel of timm has no such script, so these tests need the path of one in AMP_PLUGIN_TIMM_LEGACY_TRAIN.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import host_problem as problem
import numpy as np
import pages
import pytest
import torch
from PIL import Image
from repository import ROOT

SCRIPT = os.environ.get("AMP_PLUGIN_TIMM_LEGACY_TRAIN", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT, reason="needs timm's legacy_train.py: set AMP_PLUGIN_TIMM_LEGACY_TRAIN to its path"),
]
ARGUMENTS = """--data-dir images --model vit_tiny_patch16_224 --model-kwargs img_size=8 patch_size=4 embed_dim=16
 depth=1 num_heads=2 --img-size 8 --input-size 3 8 8 --num-classes 4 -b 8 --device cpu --workers 0 --epochs 1 --lr 0.2
 --warmup-epochs 0 --grad-accum-steps 2 --clip-grad 1.0 --model-ema --experiment run --device-modules amp_plugin"""


def patched(text: str) -> str:
    """Apply the page's diff, which has no line numbers: each hunk is found by its own lines."""
    [block] = pages.blocks(ROOT / "recipes" / "guides" / "HOSTS.md", "diff")
    for hunk in block.code.split(" ...\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    return "import amp_plugin\n" + text


def train(folder: Path, opt: str, *, edited: bool) -> dict[str, Any]:
    draws, text = np.random.default_rng(0), Path(SCRIPT).read_text()
    for split, count in (("train", 48), ("validation", 8)):
        for i in range(count):
            path = folder / "images" / split / str(i % 4) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    (folder / "legacy_train.py").write_text(patched(text) if edited else text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(
        [sys.executable, "legacy_train.py", *ARGUMENTS.split(), *opt.split()],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(ran.stderr[-3000:])
    checkpoint: dict[str, Any] = torch.load(next(folder.rglob("last.pth.tar")), weights_only=False)
    return checkpoint


def test_edited_as_the_page_says_it_trains_with_amp(tmp_path: Path) -> None:
    for name in ("plain", "zero", "amp", "bare"):
        (tmp_path / name).mkdir()
    plain = train(tmp_path / "plain", "--opt sgd", edited=False)
    zero = train(tmp_path / "zero", "--opt amp --opt-kwargs epsilon=0.0", edited=True)
    amp = train(tmp_path / "amp", "--opt amp --opt-kwargs epsilon=0.1", edited=True)
    for part in ("state_dict", "state_dict_ema"):
        problem.assert_same_bits(zero[part], plain[part])
    assert any(not torch.equal(amp["state_dict"][name], value) for name, value in plain["state_dict"].items())
    with pytest.raises(RuntimeError, match=re.escape("without a closure needs 1 ascent step(s) before it, got 0")):
        train(tmp_path / "bare", "--opt amp", edited=False)
