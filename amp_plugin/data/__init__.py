"""Classification data: loading, batched augmentation, and what a `DataLoader` or a Trainer takes.

`load_images` gives the decoded images, `ImageBatches` augmented batches of them, `collate` the data collator;
`load_texts` and `TextBatches` the same for texts.
With `transformers.Trainer` add `amp_plugin.data.callback.EpochCallback`, which says why.
"""

from __future__ import annotations

from amp_plugin.data.augment import Augmentation
from amp_plugin.data.datasets import load_images
from amp_plugin.data.images import ImageData, ImageSplit
from amp_plugin.data.loader import ImageBatches, collate
from amp_plugin.data.settings import DatasetSettings
from amp_plugin.data.splits import DatasetError
from amp_plugin.data.texts import TextBatches, TextData, TextSplit, load_texts

__all__ = [
    "Augmentation",
    "DatasetError",
    "DatasetSettings",
    "ImageBatches",
    "ImageData",
    "ImageSplit",
    "TextBatches",
    "TextData",
    "TextSplit",
    "collate",
    "load_images",
    "load_texts",
]
