"""Folders of images as users have them: one folder for each split, and in it one for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "test")


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Draw an image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_folder(
    folder: Path, classes: Sequence[str] | Mapping[str, Sequence[str]] = ("cat", "dog"), images: int = 4
) -> str:
    """Write so many images of each class; the classes may be given for each split."""
    by_split = classes if isinstance(classes, Mapping) else dict.fromkeys(SPLITS, classes)
    number = 0
    for split, names in by_split.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for row in range(images):
                picture(number).save(folder / split / name / f"{row}.png")
                number += 1
    return str(folder)
