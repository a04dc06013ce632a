"""Methods against others than ERM and AMP: those of the scale that theirs is like, and those that they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guides.page import table

from amp_plugin.text import in_markdown
from reproduction.comparison import AMP, REFERENCE, Row, reference_of
from reproduction.published import Setting, methods
from reproduction.table import DIGITS, differences


def combinations(tables: Mapping[Setting, Sequence[Row]]) -> str:
    """Render, by setting, what the methods that another is made of have more than it; nothing if there is none.

    A method is made of those whose values it takes, of which ERM and AMP alone are in the table of all methods already.
    """
    parts = []
    for setting, rows in tables.items():
        lines = []
        for row in rows:
            sources = methods()[row.method].sources
            for source in () if len(sources) == 1 and sources[0] in (row.method, REFERENCE, AMP) else sources:
                names = [in_markdown(methods()[name].label) for name in (row.method, source)]
                lines.append([*names, *differences([reference_of(rows, source)], row, {**DIGITS, "eval_ece": 3})])
        if lines:
            heads = [
                "method",
                "made of",
                *(f"that alone minus method: {measure}" for measure in ("error", "NLL", "ECE")),
            ]
            parts.append(f"Methods on {setting.dataset} against what they are made of:\n\n{table(heads, lines)}")
    return "\n\n".join(parts)


def of_scales(tables: Mapping[Setting, Sequence[Row]], others: Mapping[Setting, Sequence[Row]], other: str) -> str:
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
