"""Parts of a Markdown page that a script writes, between two comments that name it."""

from __future__ import annotations

from pathlib import Path


def read(page: Path, mark: str) -> str:
    """What stands between the marks, without the empty lines beside them.

    Raises:
        ValueError: the page has not these marks once each.
    """
    _, part, _ = _split(page, mark)
    return part.strip("\n")


def replace(page: Path, mark: str, text: str) -> None:
    """Put a text between the marks.

    Raises:
        ValueError: the page has not these marks once each.
    """
    before, _, after = _split(page, mark)
    page.write_text(f"{before}\n{text}\n{after}")


def has(page: Path, mark: str) -> bool:
    """Whether the page exists and has the marks."""
    return page.is_file() and f"<!-- {mark}: begin -->" in page.read_text()


def _split(page: Path, mark: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must have the lines {begin.strip()!r} and {end!r} once each, in this order")
    before, rest = text.split(begin)
    part, after = rest.split(end)
    return before + begin, part, end + after
