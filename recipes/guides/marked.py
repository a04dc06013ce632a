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
    """Put a text between the marks; a page that is not there yet is made of nothing else.

    Raises:
        ValueError: the page has not these marks once each.
    """
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("\n".join(_marks(mark)) + "\n")
    before, _, after = _split(page, mark)
    page.write_text(f"{before}\n{text}\n{after}")


def _marks(mark: str) -> tuple[str, str]:
    return f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"


def _split(page: Path, mark: str) -> tuple[str, str, str]:
    begin, end = _marks(mark)
    text = page.read_text()
    if text.count(f"{begin}\n") != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once each, in this order")
    before, rest = text.split(f"{begin}\n")
    part, after = rest.split(end)
    return f"{before}{begin}\n", part, end + after
