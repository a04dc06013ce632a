"""Old names of public methods and attributes, which work for one version and warn."""

from __future__ import annotations

import warnings
from typing import Any


class Renamed:
    """A descriptor for an attribute that has a new name; the old one gives the same and a DeprecationWarning.

    Args:
        new: new name of the attribute, on the same class.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        warn_renamed(self.old, self.new, stacklevel=3)
        return getattr(owner if instance is None else instance, self.new)


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warn that a name is deprecated.

    Args:
        old: old name, as its user wrote it.
        new: new name.
        stacklevel: frames up to the user's line, see `warnings.warn`.
    """
    warnings.warn(f"{old} is now {new}; the old name goes in the next version", DeprecationWarning, stacklevel + 1)
