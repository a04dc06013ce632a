"""Labels and class-balanced parts, which splits of images and of texts have in common."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from amp_plugin.data.draws import NOISE_STREAM, SELECTION_STREAM, uniform_draws

Split = TypeVar("Split", bound="LabelledSplit")
_LARGE = 2**32  # bytes


class DatasetError(ValueError):
    """A data set cannot be used; the message names it and says what to do."""


class LabelledSplit:
    """Labelled examples, of which a class-balanced part can be taken.

    A subclass is a dataclass whose fields are arrays of one row per example.
    """

    kind: ClassVar[str]  # word for the examples, in the plural
    labels: npt.NDArray[np.int64]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return a hash that tells whether two splits hold the same examples and labels, in the same order.

        Of arrays above 4 GiB it reads rows spread evenly, up to so much.
        """
        digest = hashlib.sha256()
        for name, array in vars(self).items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            if array.dtype.hasobject:
                digest.update(repr(array.tolist()).encode(errors="surrogatepass"))
            else:
                rows = array[:: 1 + array.nbytes // _LARGE]
                for start in range(0, len(rows), 1024):  # a memory map is read piece by piece
                    digest.update(np.ascontiguousarray(rows[start : start + 1024]).data)
        return digest.hexdigest()[:16]

    def subset(self: Split, n: int, seed: int = 0) -> Split:
        """Take ``n`` random examples, equally many of every class (give or take one), in their present order.

        Raises:
            DatasetError: a class has too few examples.
        """
        return self._take(self.subset_indices(n, seed))

    def subset_indices(self, n: int, seed: int = 0) -> npt.NDArray[np.intp]:
        """Return the indices of the examples of ``subset(n, seed)``, in ascending order."""
        return np.sort(self._balanced(n, seed)[:n])

    def split(self: Split, n: int, seed: int = 0) -> tuple[Split, Split]:
        """Hold out the examples of ``subset(n, seed)`` for validation.

        Returns:
            The other examples and the held-out ones, disjoint.

        Raises:
            DatasetError: a class has too few examples, or none would be left.
        """
        if n == len(self):
            raise DatasetError(f"holding out all {n} {self.kind} leaves none to train on; hold out fewer")
        order = self._balanced(n, seed)
        return self._take(np.sort(order[n:])), self._take(np.sort(order[:n]))

    def spread(self: Split, n: int) -> Split:
        """Take ``n`` examples from places that are spread evenly, since a split may be sorted by class."""
        return self._take(np.arange(n) * len(self) // n)

    def with_label_noise(self: Split, fraction: float, classes: int, seed: int) -> Split:
        """Give ``round(fraction * N)`` random examples another label, drawn evenly from the other classes.

        Which examples change, and to what, depends on the seed and on their places in the split alone.

        Args:
            fraction: share of the examples, in [0, 1).
            classes: number of classes.
            seed: seed of the noise.

        Raises:
            DatasetError: the fraction is above 0, and so small that no label would change.
        """
        changed = round(fraction * len(self))
        if fraction and not changed:
            raise DatasetError(f"label noise of {fraction:g} changes no label of {len(self)} {self.kind}; ask for more")
        chance, other = uniform_draws(seed, NOISE_STREAM, len(self), 2).T
        which = np.argsort(chance, kind="stable")[:changed]
        labels = self.labels.copy()
        labels[which] += 1 + (other[which] * (classes - 1)).astype(np.int64)
        split: Any = self
        return replace(split, labels=labels % classes)  # type: ignore[no-any-return]

    def _balanced(self, n: int, seed: int) -> npt.NDArray[np.intp]:
        """Shuffle all indices such that the first ``n`` hold the classes equally often."""
        if not 0 < n <= len(self):
            raise DatasetError(f"cannot take {n} of {len(self)} {self.kind}; ask for 1 to {len(self)}")
        chance = uniform_draws(seed, SELECTION_STREAM, len(self), 1)[:, 0]
        shuffled = np.lexsort((chance, self.labels))  # class by class, each class shuffled
        of_class = self.labels[shuffled]
        turn = np.arange(len(self)) - np.searchsorted(of_class, of_class)  # place within its class
        order = shuffled[np.lexsort((chance[shuffled], turn))]
        classes, available = np.unique(self.labels, return_counts=True)
        each = n // len(classes)
        scarce = int(np.argmin(available))
        if available[scarce] < each or np.minimum(available, each + 1).sum() < n:
            raise DatasetError(
                f"a class-balanced choice of {n} {self.kind} needs {n / len(classes):g} of every class, but class"
                f" {classes[scarce]} has only {available[scarce]}; ask for at most"
                f" {available[scarce] * len(classes)}"
            )
        return order

    def _take(self: Split, indices: npt.NDArray[np.intp]) -> Split:
        make: Any = type(self)
        return make(*(array[indices] for array in vars(self).values()))  # type: ignore[no-any-return]
