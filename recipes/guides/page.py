"""What the scripts share that write tables and pictures into Markdown pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from amp_plugin.command import run_command
from amp_plugin.text import in_cell


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a Markdown table."""
    return "\n".join(f"| {' | '.join(map(in_cell, cells))} |" for cells in (heads, ["---"] * len(heads), *rows))


def read_part(page: Path, mark: str) -> str:
    """Return what stands between the marks of a page, without the empty lines beside them."""
    return _split(page, page.read_text(encoding="utf-8"), mark)[1].strip("\n")


def write_part(
    page: Path, mark: str, text: str, draw: Callable[[Path], object] | None = None, picture: str = "", alt: str = ""
) -> None:
    """Put a text between the marks of a page, below a picture if `draw` draws one into a file beside the page.

    A page that does not exist yet is made of the marked part alone. A page without these marks, or whose picture
    cannot be drawn, stays as it was. `alt` describes the picture for those who do not see it.
    """
    now = page.read_text(encoding="utf-8") if page.exists() else f"<!-- {mark}: begin -->\n<!-- {mark}: end -->\n"
    before, _, after = _split(page, now, mark)
    page.parent.mkdir(parents=True, exist_ok=True)
    if draw is not None:
        draw(page.with_name(picture))
        text = f"![{alt}]({picture})\n\n{text}"
    write_whole(page, f"{before}\n{text}\n{after}")


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole, or leave it as it was."""
    new = file.with_name(f"_{file.name}")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def run_script(main: Callable[[], None]) -> None:
    """Run a script; a mistake of its user and an interruption end it with one line."""

    def continued() -> None:
        try:
            main()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command continues") from None
        except ImportError as error:
            raise ValueError(f'{error} (pip install "amp-plugin[plots]")') from error

    run_command(continued, (FileNotFoundError, ValueError))


def _split(page: Path, text: str, mark: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if text.count(f"{begin}\n") != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once each, in this order")
    before, rest = text.split(f"{begin}\n")
    part, after = rest.split(end)
    return f"{before}{begin}\n", part, end + after
