"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, at_most: int = 1) -> str:
    """Return ", did you mean 'x' or 'y'" for the middle of an error message; "" if no known name is near."""

    def likeness(other: str) -> tuple[float, int]:
        # Among equally near names the longest common start decides, because people err at the end of a name.
        start = os.path.commonprefix([name, other])  # noqa: RUF071  (characters are meant, not folders)
        return difflib.SequenceMatcher(a=other, b=name).ratio(), len(start)

    near = sorted(difflib.get_close_matches(name, list(known), n=5), key=likeness, reverse=True)[:at_most]
    return f", did you mean {' or '.join(map(repr, near))}" if near else ""
