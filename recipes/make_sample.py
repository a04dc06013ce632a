"""Draw the sample of CIFAR-10 that comes with the package, again.

    python recipes/make_sample.py --data_root DIR

The images are lossless WebP in parquet, in the layout of the Hub repository uoft-cs/cifar10.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from amp_plugin.data import load_images
from amp_plugin.data.settings import BUNDLED, SOURCES

TRAIN_IMAGES, TEST_IMAGES = 2000, 500


def main() -> None:
    """Write the train and the test file into the package, or elsewhere."""
    parser = argparse.ArgumentParser(description="Draw the bundled sample of CIFAR-10 again.")
    parser.add_argument("--data_root", help="folder laid out like the Hub; without it, the Hub")
    parser.add_argument("--output", type=Path, default=Path(SOURCES[BUNDLED].path), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = load_images("cifar10", data_root=args.data_root)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(data.class_names))})
    for name, whole, n in (("train", data.train, TRAIN_IMAGES), ("test", data.test, TEST_IMAGES)):
        path = args.output / "plain_text" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        split = whole.subset(n, args.seed)
        columns = {"img": [{"bytes": webp(image)} for image in split.images], "label": split.labels.tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
        print(f"{path}: {n} images, {path.stat().st_size / 1e6:.1f} MB")


def webp(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image (H, W, 3) without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
