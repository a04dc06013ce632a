"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, at_most: int = 1) -> str:
    """For the middle of an error message: ", did you mean 'x' or 'y'", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=at_most)
    return f", did you mean {' or '.join(map(repr, near))}" if near else ""
