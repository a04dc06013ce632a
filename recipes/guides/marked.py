"""Parts of a Markdown page that a script writes, between two comments that name it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def read(page: Path, mark: str) -> str:
    """What stands between the marks, without the empty lines beside them.

    Raises:
        ValueError: the page has not these marks once each.
    """
    _, part, _ = _split(page, page.read_text(), mark)
    return part.strip("\n")


def replace(page: Path, mark: str, text: str, draw: Callable[[], object] = lambda: None) -> None:
    """Put a text between the marks; a page that is not there yet is made of nothing else.

    Args:
        page: Markdown.
        mark: name of the part.
        text: for it.
        draw: makes the picture that the text links to; if it fails, the page stays as it was.

    Raises:
        ValueError: the page has not these marks once each; nothing has been drawn or written.
    """
    now = page.read_text() if page.exists() else "\n".join(_marks(mark)) + "\n"
    before, _, after = _split(page, now, mark)
    page.parent.mkdir(parents=True, exist_ok=True)
    draw()
    page.write_text(f"{before}\n{text}\n{after}")


def _marks(mark: str) -> tuple[str, str]:
    return f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"


def _split(page: Path, text: str, mark: str) -> tuple[str, str, str]:
    begin, end = _marks(mark)
    if text.count(f"{begin}\n") != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once each, in this order")
    before, rest = text.split(f"{begin}\n")
    part, after = rest.split(end)
    return f"{before}{begin}\n", part, end + after
