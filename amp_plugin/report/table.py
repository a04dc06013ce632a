"""Figures as a small table."""

from __future__ import annotations

from collections.abc import Mapping


def table(rows: Mapping[str, str]) -> str:
    """Render names and values as two aligned columns between rules."""
    left = max(len(name) for name in rows)
    right = max(len(value) for value in rows.values())
    rule = "-" * (left + right + 2)
    return "\n".join([rule, *(f"{name:<{left}}  {value:>{right}}" for name, value in rows.items()), rule])
