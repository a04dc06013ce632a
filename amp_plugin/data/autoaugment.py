"""AutoAugment (Cubuk et al., CVPR 2019, https://arxiv.org/abs/1805.09501) for a whole batch at once.

Policies, magnitudes and operations are torchvision's; this file only decides which images each operation
gets, so the result equals `torchvision.transforms.AutoAugment` on each uint8 tensor, bit for bit.
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
# Mixtures of the image with another one, 1 + magnitude of the first; Contrast's other one is not in whole numbers.
_MIXTURES = ("Brightness", "Color", "Sharpness")
_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

Operation = tuple[str, float]  # torchvision's name, and the magnitude with its sign


class BatchAutoAugment:
    """Apply one of torchvision's AutoAugment policies to batches of one image size.

    Args:
        policy: cifar10, svhn or imagenet.
        image_size: (H, W).
        fill: grey level of what moves into the image. The classic implementations fill with 128, mid-grey.

    Raises:
        ValueError: torchvision has no such policy.
    """

    def __init__(self, policy: str, image_size: tuple[int, int], fill: int = 128) -> None:
        known = [member.value for member in AutoAugmentPolicy]
        if policy not in known:
            raise ValueError(f"AutoAugment policy {policy!r} is unknown; use one of {', '.join(known)}")
        self.fill = fill
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
        self.operations: list[Operation] = sorted(distinct, key=lambda op: (op[0] not in _GEOMETRIC, op))
        geometric = [op for op in self.operations if op[0] in _GEOMETRIC]
        # What is done together to the images of a batch: a mixture at whatever magnitudes, others at one each.
        together = [name if name in _MIXTURES else (name, magnitude) for name, magnitude in self.operations]
        self._group = np.array([together.index(group) for group in together])
        self._magnitude = np.array([magnitude for _, magnitude in self.operations])
        self._origins = torch.stack([_pixel_origins(op, image_size) for op in geometric])
        # By sub-policy and step; the operations by sign as well.
        self._probability = np.array([[p for _, p, _ in pair] for pair in reference.policies])
        self._index = np.array([[[self.operations.index(op) for op in ops] for ops in pair] for pair in pairs])

    def __call__(
        self,
        images: Tensor,
        policy_ids: npt.NDArray[np.int64],
        probs: npt.NDArray[np.float64],
        signs: npt.NDArray[np.int64],
    ) -> Tensor:
        """Augment a batch; the random numbers are those of `torchvision.transforms.AutoAugment.get_params`.

        Args:
            images: uint8 (B, 3, H, W).
            policy_ids: (B,) sub-policies, each two operations in order.
            probs: (B, 2) uniform in [0, 1): an operation runs where this is below its probability.
            signs: (B, 2) of 0 (negative magnitude, where the operation has a sign) and 1.

        Returns:
            uint8 (B, 3, H, W), a new tensor.
        """
        images = images.clone()
        for step in range(2):
            runs = np.flatnonzero(probs[:, step] < self._probability[policy_ids, step])
            chosen = self._index[policy_ids[runs], step, signs[runs, step]]
            moved = chosen < len(self._origins)
            if moved.any():
                rows = torch.from_numpy(runs[moved])
                images[rows] = self._move(images[rows], torch.from_numpy(chosen[moved]))
            groups = self._group[chosen]
            for group in np.unique(groups[~moved]):
                picked = groups == group
                rows = torch.from_numpy(runs[picked])
                images[rows] = _recolour(images[rows], self.operations[group][0], self._magnitude[chosen[picked]])
        return images

    def _move(self, images: Tensor, operations: Tensor) -> Tensor:
        """Apply a geometric operation of its own to each image (n, 3, H, W), all in one gather."""
        outside = images.new_full((*images.shape[:2], 1), self.fill)
        pixels = torch.cat([images.flatten(2), outside], dim=2)
        origins = self._origins[operations].unsqueeze(1).expand(-1, 3, -1)
        return pixels.gather(2, origins).view_as(images)


def _pixel_origins(operation: Operation, image_size: tuple[int, int]) -> Tensor:
    """Where a geometric operation takes each pixel from: (H * W,) flat indices, H * W for outside the image.

    Found by sending an image of pixel numbers, from 1, through torchvision's operation (exact in float32 to
    2**24).
    """
    height, width = image_size
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    origins: Tensor = _apply_op(numbers, *operation, InterpolationMode.NEAREST, [0.0]).flatten().long() - 1
    return origins.where(origins >= 0, height * width)


def _recolour(images: Tensor, name: str, magnitudes: npt.NDArray[np.float64]) -> Tensor:
    """Apply one operation that leaves every pixel in its place to (n, 3, H, W); all but mixtures at one magnitude."""
    if name == "Equalize":  # _apply_op's goes image by image; v2's is the same integers for the batch
        equalized: Tensor = equalize(images)
        return equalized
    if name == "Sharpness" and min(images.shape[2:]) <= 2:
        return images  # too small to be blurred
    if name in _MIXTURES:
        ratio = torch.from_numpy(1.0 + magnitudes).view(-1, 1, 1, 1)
        other: Tensor = _apply_op(images, name, -1.0, InterpolationMode.NEAREST, None)  # with none of the image in it
        mixture = images.mul(ratio.float()).add_(other.mul((1.0 - ratio).float()))
        return mixture.clamp_(0, 255).to(torch.uint8)
    result: Tensor = _apply_op(images, name, float(magnitudes[0]), InterpolationMode.NEAREST, None)
    return result
