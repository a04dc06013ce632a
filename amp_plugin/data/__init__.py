"""Classification data for a `DataLoader` or a Trainer, and augmentation of whole batches.

`load_images` returns decoded images, `ImageBatches` makes augmented batches of them, and `collate` is the data
collator. `load_texts` and `TextBatches` do so for texts. `transformers.Trainer` needs
`amp_plugin.data.callback.EpochCallback` beside them, which says why.
"""

from __future__ import annotations

from amp_plugin.data.augment import Augmentation
from amp_plugin.data.images import ImageData, ImageSplit, load_images
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
