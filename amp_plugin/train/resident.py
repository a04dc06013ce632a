"""The main job's images on the device, where their batches are made by a captured function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging

from amp_plugin.core.captured_call import CapturedCall
from amp_plugin.data import ImageBatches
from amp_plugin.train.options import RecipeArguments

logger = logging.get_logger(__name__)
Batch = tuple[Tensor, Tensor]  # pixel values and labels


def move_to_device(batches: ImageBatches, args: RecipeArguments) -> None:
    """Move images to the device of a training that is captured, unless workers load them or the bits would change."""
    if not args.captures or args.dataloader_num_workers:
        return
    if batches.resident_reason is not None:
        logger.warning(f"The images stay on the CPU: {batches.resident_reason}.")
        return
    batches.to(args.device)
    assert batches.device_batch is not None
    batches.device_batch = CapturedBatch(batches.device_batch, args.device)


class CapturedBatch:
    """A function that makes batches of tables, as a CUDA graph for every size of a batch.

    Args:
        make: function of a table (B, columns) on the device that returns pixel values and labels.
        device: the device.
    """

    def __init__(self, make: Callable[[Tensor], Batch], device: torch.device) -> None:
        self._make, self._device = make, device
        self._calls: dict[int, tuple[Tensor, CapturedCall[Batch]]] = {}

    def __call__(self, table: Tensor) -> Batch:
        """Return pixel values and labels, which stay as they are: a loader asks for a batch ahead of its time."""
        if len(table) not in self._calls:
            place = torch.empty_like(table)
            call = CapturedCall(lambda: self._make(place), self._device, "--capture: the augmentation", warm_up=3)
            self._calls[len(table)] = place, call
        place, call = self._calls[len(table)]
        place.copy_(table)
        pixels, labels = call()
        return (pixels.clone(), labels.clone()) if call.captured else (pixels, labels)
