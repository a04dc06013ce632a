"""The methods of a scale against those of the scale that it is like, over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guides.page import table

from amp_plugin.text import in_markdown
from reproduction.comparison import AMP, REFERENCE, Row, reference_of
from reproduction.published import Setting, methods
from reproduction.table import DIGITS, differences


def markdown(tables: Mapping[Setting, Sequence[Row]], others: Mapping[Setting, Sequence[Row]], other: str) -> str:
    """Render, by setting, what the other scale's ERM, its AMP and its same method have more than a method here.

    Args:
        tables: rows of the scale.
        others: rows of the scale that it is like.
        other: the name of that scale.

    Returns:
        The tables, with a sentence that says what they show; nothing where the two have no setting in common.
    """
    heads = ["method here", "seeds"]
    heads += [f"{name} of {other} minus here: {m}" for name in ("ERM", "AMP", "same method") for m in ("error", "NLL")]
    parts = []
    for setting, rows in tables.items():
        there = others.get(setting, [])
        references = [reference_of(there, method) for method in (REFERENCE, AMP)]
        lines = []
        for row in rows:
            compared = [*references, reference_of(there, row.method)]
            lines.append(
                [in_markdown(methods()[row.method].label), str(len(row.runs)), *differences(compared, row, DIGITS)]
            )
        if there:
            parts.append(table(heads, lines))
    if not parts:
        return ""
    said = f"Beside the scale {other}, over the seeds that both have; positive where the method here is the better one."
    return "\n\n".join([said, *parts])
