"""AutoAugment (Cubuk et al., CVPR 2019, https://arxiv.org/abs/1805.09501) for a whole batch at once.

Policies, magnitudes and operations are torchvision's; this module only decides which images each operation gets.
The result equals `torchvision.transforms.AutoAugment` on each uint8 tensor, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2.functional import equalize

_BINS = 10  # magnitudes of the paper's search space
# These mix the image, with weight 1 + magnitude, and another one. Contrast does too, but not in whole numbers.
MIXTURES = ("Brightness", "Color", "Sharpness")
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

Operation = tuple[str, float]  # torchvision's name, and the magnitude with its sign


class BatchAutoAugment:
    """Apply one of torchvision's AutoAugment policies, cifar10, svhn or imagenet, to batches of one image size (H, W).

    Pixels that move into the image have the grey level ``fill``, by default 128, as in the classic implementations.
    """

    def __init__(self, policy: str, image_size: tuple[int, int], fill: int = 128) -> None:
        known = [member.value for member in AutoAugmentPolicy]
        if policy not in known:
            raise ValueError(f"AutoAugment policy {policy!r} is unknown; use one of {', '.join(known)}")
        self.fill, self.image_size = fill, image_size
        reference = AutoAugment(AutoAugmentPolicy(policy))
        space = reference._augmentation_space(_BINS, image_size)
        self.num_sub_policies = len(reference.policies)

        def operation(name: str, bin_: int | None, sign: int) -> Operation:
            magnitudes, signed = space[name]
            magnitude = 0.0 if bin_ is None else float(magnitudes[bin_])
            return name, -magnitude if signed and sign == 0 else magnitude

        pairs = [
            [[operation(name, bin_, sign) for sign in (0, 1)] for name, _, bin_ in pair] for pair in reference.policies
        ]
        # Geometric operations first, so that an index tells which kind it is.
        distinct = {op for pair in pairs for signs in pair for op in signs}
        self.operations: list[Operation] = sorted(distinct, key=lambda op: (op[0] not in GEOMETRIC, op))
        geometric = [op for op in self.operations if op[0] in GEOMETRIC]
        # A mixture treats images of all magnitudes together, any other operation those of one magnitude.
        together = [name if name in MIXTURES else (name, magnitude) for name, magnitude in self.operations]
        self._group = np.array([together.index(group) for group in together])
        self._magnitude = np.array([magnitude for _, magnitude in self.operations])
        self.origins = torch.stack([_pixel_origins(op, image_size) for op in geometric])
        # Probabilities are indexed by sub-policy and step, operations by sub-policy, step and sign.
        self._probability = np.array([[p for _, p, _ in pair] for pair in reference.policies])
        self._index = np.array([[[self.operations.index(op) for op in ops] for ops in pair] for pair in pairs])

    def __call__(
        self,
        images: Tensor,
        policy_ids: npt.NDArray[np.int64],
        probs: npt.NDArray[np.float64],
        signs: npt.NDArray[np.int64],
    ) -> Tensor:
        """Augment uint8 (B, 3, H, W) into a new tensor, with the random numbers of torchvision's `get_params`.

        A sub-policy, of which ``policy_ids`` (B,) are the indices, is two operations in order. An operation runs where
        its probability is larger than ``probs`` (B, 2), which are uniform in [0, 1). A magnitude that has a sign is
        negative where ``signs`` (B, 2) are 0 and not 1.
        """
        images = images.clone()
        for operations in self.choose(policy_ids, probs, signs).T:
            runs = np.flatnonzero(operations < len(self.operations))
            chosen = operations[runs]
            moved = chosen < len(self.origins)
            if moved.any():
                rows = torch.from_numpy(runs[moved])
                images[rows] = self._move(images[rows], torch.from_numpy(chosen[moved]))
            groups = self._group[chosen]
            for group in np.unique(groups[~moved]):
                picked = groups == group
                rows = torch.from_numpy(runs[picked])
                images[rows] = _recolour(images[rows], self.operations[group][0], self._magnitude[chosen[picked]])
        return images

    def choose(
        self, policy_ids: npt.NDArray[np.int64], probs: npt.NDArray[np.float64], signs: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Find the operations of each image, (B, 2) indices into `operations`, or their number for no operation."""
        ids, steps = policy_ids[:, None], np.arange(2)
        chosen = self._index[ids, steps, signs]
        return np.where(probs < self._probability[ids, steps], chosen, len(self.operations))

    def _move(self, images: Tensor, operations: Tensor) -> Tensor:
        """Apply one geometric operation to each image (n, 3, H, W), all in one gather."""
        outside = images.new_full((*images.shape[:2], 1), self.fill)
        pixels = torch.cat([images.flatten(2), outside], dim=2)
        origins = self.origins[operations].unsqueeze(1).expand(-1, 3, -1)
        return pixels.gather(2, origins).view_as(images)


def _pixel_origins(operation: Operation, image_size: tuple[int, int]) -> Tensor:
    """Find where a geometric operation takes each pixel from: (H * W,) flat indices, H * W for outside the image.

    An image of pixel numbers, from 1, goes through torchvision's operation, which is exact in float32 up to 2**24.
    """
    height, width = image_size
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    origins: Tensor = _apply_op(numbers, *operation, InterpolationMode.NEAREST, [0.0]).flatten().long() - 1
    return origins.where(origins >= 0, height * width)


def _recolour(images: Tensor, name: str, magnitudes: npt.NDArray[np.float64]) -> Tensor:
    """Apply an operation that moves no pixel to (n, 3, H, W); only mixtures take several magnitudes at once."""
    if name == "Equalize":  # _apply_op goes image by image; v2 finds the same integers for the batch
        equalized: Tensor = equalize(images)
        return equalized
    if name == "Sharpness" and min(images.shape[2:]) <= 2:
        return images  # too small to be blurred
    if name in MIXTURES:
        ratio = torch.from_numpy(1.0 + magnitudes).view(-1, 1, 1, 1)
        other: Tensor = _apply_op(images, name, -1.0, InterpolationMode.NEAREST, None)  # the image has weight 0 here
        mixture = images.mul(ratio.float()).add_(other.mul((1.0 - ratio).float()))
        return mixture.clamp_(0, 255).to(torch.uint8)
    result: Tensor = _apply_op(images, name, float(magnitudes[0]), InterpolationMode.NEAREST, None)
    return result
