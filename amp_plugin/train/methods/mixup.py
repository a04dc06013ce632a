"""Mix pairs of images, and their labels, in convex combinations.

Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import MixUp

from amp_plugin.data import ImageBatches
from amp_plugin.data.loader import Batch


class MixedBatches(ImageBatches):
    """Mix batches by torchvision's `MixUp`: each image with its neighbour, all in one proportion from Beta(a, a).

    The proportion is a function of (seed, epoch, the batch's indices), so the number of workers, earlier draws and the
    step at which a run is resumed make no difference. The sampler has shuffled, so a neighbour is a random one.
    """

    def __init__(self, *args: Any, alpha: float, classes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mix = MixUp(alpha=alpha, num_classes=classes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return pixel_values, float32 (B, 3, H, W), and as labels the classes' shares, float32 (B, classes)."""
        batch = super().__getitems__(indices)
        entropy = np.random.SeedSequence([self.seed, int(self._epoch), *map(int, indices)])
        with torch.random.fork_rng(devices=[]):
            # The proportion is drawn on the host; `torch.manual_seed` would seed all devices, whose dropout goes on.
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            mixed, batch["labels"] = self._mix(batch["pixel_values"], batch["labels"])
        batch["pixel_values"] = mixed.contiguous(memory_format=self._augmenter.memory_format)  # CUDA's roll forgets it
        return batch
