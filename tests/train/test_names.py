"""Test that the main job takes the names of data sets and classes, and the values of options, as text."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features
from huggingface_hub import ModelCard
from main_job import QUICK
from PIL import Image

from amp_plugin.train import job
from amp_plugin.train.options import with_recipe

NAME = "$x^$ |\x1b[31m <b> *名*"
CLASSES = ("$x^$", r"$\frac{$", "_a|b`", "\x1b[31m😀")


def test_names_and_options_with_markup_reach_folder_card_pictures_and_an_ascii_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="draws pictures")
    images = [Image.new("RGB", (32, 32), (30 * i, 5 * i, 9 * i)) for i in range(8)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list(CLASSES))})
    (tmp_path / NAME).mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_dict({"image": images, "label": [0, 1, 2, 3] * 2}, features)
        rows.to_parquet(tmp_path / NAME / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    given = ["--dataset", NAME, "--image_column", "image", "--label_column", "label", "--optim", "amp"]
    given += ["--amp_parameters", "stem|layer", "--max_steps", "1"]
    job.run([*QUICK, "--train_images", "8", *given, "--output_dir", "run"])
    printed = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert rb"$x^$ |\x1b[31m <b> *\u540d*: 8 images" in printed
    assert b" to test, 4 classes; amp" in printed
    assert b"\x1b" not in printed
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert r"\$x^\$ &#124;\\x1b\[31m &lt;b> \*名\*".replace("b>", r"b\>") in card
    assert r"| <code>stem&#124;layer</code> |" in card
    assert {r.dataset_name for r in ModelCard(card).data.eval_results or []} == {NAME}
    assert {path.name for path in Path("run").glob("*.png")} == {"confusion.png", "curves.png", "reliability.png"}
    again = with_recipe([str(tmp_path / "run" / "config.yaml")])
    assert NAME in " ".join(again)
    assert "stem|layer" in " ".join(again)


def test_an_error_shows_names_as_they_are() -> None:
    with pytest.raises(SystemExit, match=r"^error: .*nosuch\\x1b\[2J") as end:
        job.run([*QUICK, "--dataset", "nosuch\x1b[2J"])
    assert "\x1b" not in str(end.value)
