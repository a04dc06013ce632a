"""Draw the sample of CIFAR-10 that comes with the package, again.

    python recipes/make_sample.py --data_root DIR

The images are lossless WebP in parquet, in the layout of the Hub repository uoft-cs/cifar10.
"""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
from guides.page import run_script
from PIL import Image

from amp_plugin.arguments import Parser, number, path
from amp_plugin.data import load_images
from amp_plugin.data.settings import BUNDLED, SOURCES
from amp_plugin.trainer.checkpoints import check_writable

TRAIN_IMAGES, TEST_IMAGES = 2000, 500


def main() -> None:
    """Write the train and the test file into the package, or elsewhere."""
    parser = Parser(description="Draw the bundled sample of CIFAR-10 again.")
    parser.add_argument("--data_root", type=path, help="folder laid out like the Hub; without it, the Hub")
    parser.add_argument("--output", type=path, default=Path(SOURCES[BUNDLED].path), help="folder to write into")
    parser.add_argument("--seed", type=number(int, "[0, inf)"), default=0)
    args = parser.parse_args()
    check_writable(args.output)
    data = load_images("cifar10", data_root=args.data_root)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(data.class_names))})
    for name, whole, n in (("train", data.train, TRAIN_IMAGES), ("test", data.test, TEST_IMAGES)):
        file = args.output / "plain_text" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        split = whole.subset(n, args.seed)
        columns = {"img": [{"bytes": webp(image)} for image in split.images], "label": split.labels.tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))
        print(f"{file}: {n} images, {file.stat().st_size / 1e6:.1f} MB")


def webp(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image (H, W, 3) without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


if __name__ == "__main__":
    run_script(main)
