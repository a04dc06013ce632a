"""AutoAugment for a batch whose operations only the device knows: every image goes through all of them, most at rest.

The shapes do not depend on which image gets which operation, so that a CUDA graph can capture the batch. The arithmetic
is torchvision's, or whole numbers in place of a sum whose order a device would choose: the bits are those of
`BatchAutoAugment` on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.functional import rgb_to_grayscale
from torchvision.transforms.v2.functional import equalize

from amp_plugin.data.autoaugment import GEOMETRIC, MIXTURES, BatchAutoAugment, Operation

_CHOSEN = ("Equalize", "AutoContrast", "Color", "Contrast", "Sharpness")  # a column of bools tells who has it


class ResidentAutoAugment:
    """Apply one operation of `BatchAutoAugment` to each image of a batch, on the device of the batch.

    Args:
        host: the policy.
        device: where the batches lie.
    """

    def __init__(self, host: BatchAutoAugment, device: torch.device) -> None:
        operations: list[Operation] = [*host.operations, ("Identity", 0.0)]  # in the order of the indices
        self.host = host
        height, width = host.image_size
        self._blurs = min(height, width) > 2  # else too small
        still = torch.arange(height * width).expand(len(operations) - len(host.origins), -1)
        self._origins = torch.cat([host.origins, still]).to(device)
        self._chosen = torch.tensor([[name == chosen for chosen in _CHOSEN] for name, _ in operations], device=device)
        self._levels = torch.tensor([_levels(*op) for op in operations], dtype=torch.float32, device=device)
        self._area = torch.tensor(height * width, dtype=torch.float32, device=device)

    def __call__(self, images: Tensor, operations: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W) anew, where ``operations`` (B,) are indices into those of `BatchAutoAugment`."""
        outside = images.new_full((*images.shape[:2], 1), self.host.fill)
        origins = self._origins[operations].unsqueeze(1).expand(-1, 3, -1)
        images = torch.cat([images.flatten(2), outside], dim=2).gather(2, origins).view(images.shape)

        is_equalized, is_stretched, is_grey, is_mean, is_blurred = self._chosen[operations].t()[..., None, None, None]
        images = torch.where(is_equalized, equalize(images), images)
        images = torch.where(is_stretched, _stretched(images), images)

        threshold, mask, ratio, rest = self._levels[operations].t()[..., None, None, None]
        images = torch.where(images >= threshold, 255 - images, images) & mask.to(torch.uint8)

        grey = rgb_to_grayscale(images)
        # A tensor divides; on CUDA a number would be multiplied by, inverted, which rounds twice.
        mean = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int32) / self._area
        other = torch.where(is_grey, grey, mean.masked_fill(~is_mean, 0.0))
        if self._blurs:
            other = torch.where(is_blurred, _blurred(images), other)
        mixture = (images * ratio).add_(other * rest)
        augmented: Tensor = mixture.clamp_(0, 255).to(torch.uint8)
        return augmented


def _levels(name: str, magnitude: float) -> tuple[float, float, float, float]:
    """Return the level from which pixels are inverted, a mask of their bits, the weights of image and other image."""
    if name in (*MIXTURES, "Contrast"):
        return 256.0, 255.0, 1.0 + magnitude, 1.0 - (1.0 + magnitude)
    if name == "Posterize":
        return 256.0, 256.0 - 2.0 ** (8 - int(magnitude)), 1.0, 0.0
    if name in ("Solarize", "Invert"):
        return magnitude if name == "Solarize" else 0.0, 255.0, 1.0, 0.0
    if name not in (*GEOMETRIC, *_CHOSEN, "Identity"):
        raise NotImplementedError(
            f"AutoAugment operation {name!r} is not known on a device; keep the images on the CPU"
        )
    return 256.0, 255.0, 1.0, 0.0


def _stretched(images: Tensor) -> Tensor:
    """Stretch the levels of each channel to all of [0, 255], unless it has only one."""
    low = images.amin(dim=(2, 3), keepdim=True).float()
    high = images.amax(dim=(2, 3), keepdim=True).float()
    scale = 255 / (high - low)
    flat = high == low
    low, scale = low.masked_fill(flat, 0.0), scale.masked_fill(flat, 1.0)
    return ((images - low) * scale).clamp_(0, 255).to(torch.uint8)


def _blurred(images: Tensor) -> Tensor:
    """Blur all but the borders, float32 (B, 3, H, W), with weight 5 / 13 for a pixel and 1 / 13 for its neighbours."""
    blurred = images.float()
    inner = blurred[..., 1:-1, 1:-1]
    # The sums are whole numbers, and a 13th of one is never close to the middle between two whole numbers.
    inner.copy_((avg_pool2d(blurred, 3, stride=1, divisor_override=1) + 4 * inner).div_(13).round_())
    return blurred
