"""Intervals of numbers, written as in mathematics: a bracket belongs to the interval, a parenthesis does not.

``"[1, inf)"`` is any finite number from 1 on.
"""

from __future__ import annotations

import math
import re

_INTEGERS = 2**32 - 1  # the largest seed of numpy; no count of examples, steps or epochs comes near


def demand(interval: str, value: float) -> str:
    """Return what a number outside an interval must be, for an error message; the text is empty for one inside.

    An integer must also be no larger than the largest seed.
    """
    opening, low, high, closing = _parsed(interval)
    above = value >= low if opening == "[" else value > low
    below = value <= high if closing == "]" else value < high
    large = isinstance(value, int) and value > _INTEGERS
    if above and below and not large:
        return ""
    if math.isinf(high):
        whole = isinstance(value, int)
        ends = f" and at most {_INTEGERS}" if large else "" if whole or closing == "]" else " and finite"
    else:
        ends = f" and {'at most' if closing == ']' else 'below'} {_number(high)}"
    return f"{'at least' if opening == '[' else 'above'} {_number(low)}{ends}"


def _parsed(text: str) -> tuple[str, float, float, str]:
    opening, low, high, closing = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", text).groups()  # type: ignore[union-attr]
    return opening, float(low), float(high), closing


def _number(value: float) -> str:
    return f"{int(value)}" if value == int(value) else f"{value:g}"
