"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile


def did_you_mean(name: str, known: Iterable[str], *, at_most: int = 1) -> str:
    """For the middle of an error message: ", did you mean 'x' or 'y'", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=5)
    # Of equally near ones, that which begins alike: people err at the end of a name.
    near = sorted(near, key=lambda other: (_likeness(name, other), _same_start(name, other)), reverse=True)[:at_most]
    return f", did you mean {' or '.join(map(repr, near))}" if near else ""


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(a=other, b=name).ratio()


def _same_start(name: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, other, strict=False)))
