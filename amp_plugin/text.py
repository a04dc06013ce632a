"""Names as they are, whatever is in them: one function for each language that would take some characters for commands.

Names of classes, data sets and runs, and the values of options, come from elsewhere. A dollar sign is mathematics to
matplotlib, a bar ends a cell of a Markdown table, and an escape character moves the cursor of a terminal.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
import unicodedata
from urllib.parse import quote

# Marks that change the direction of the text around them; the joiners of emoji and scripts are of the same category.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ENTITIES = {"&": "&amp;", "<": "&lt;", "|": "&#124;"}  # a table's cells end at a bar even in code or after a backslash
# An underscore within a word is no emphasis.
_MARKUP = re.compile(r"[&<|]|[\\`*\[\]~$#>]|(?<![^\W_])_+|_+(?![^\W_])")


def visible(text: str) -> str:
    """Return one line with escapes for the control characters, lone surrogates and marks of direction in a text."""
    return "".join(_escape(character) if _is_hidden(character) else character for character in text)


def for_terminal(text: object) -> str:
    """Return a text whose characters move no cursor and change no colour; it keeps its own line breaks."""
    return "\n".join(map(visible, str(text).split("\n")))


def tell(text: object) -> None:
    """Print a text at once, as `for_terminal` makes it."""
    print(for_terminal(text), flush=True)


def print_all_characters() -> None:
    """Let this process print the characters that the terminal's encoding lacks as escapes, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does by default


def for_matplotlib(text: str, longest: int | None = None) -> str:
    """Return a text that matplotlib draws literally: without mathematics, in one line, cut after so many characters.

    A label that is empty or begins with an underscore gets an invisible beginning, or a legend would leave it out.
    """
    shown = shortened(visible(text), longest).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") or not shown else shown


def shortened(text: str, longest: int | None) -> str:
    """Cut a text after so many characters, with an ellipsis as the last of them."""
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def in_markdown(text: object) -> str:
    """Return a text that Markdown shows literally, in a paragraph, a heading or a cell of a table."""
    return _MARKUP.sub(_literal, visible(str(text)))


def in_code(text: object) -> str:
    """Return Markdown that shows a text literally as code, in a paragraph or a cell of a table."""
    shown = visible(str(text))
    simple = shown.strip() == shown != "" and not {"`", "|"} & set(shown)
    return f"`{shown}`" if simple else f"<code>{in_markdown(text)}</code>"


def in_fence(text: str, language: str) -> str:
    """Return a block of code in Markdown, which ends where the text ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def in_address(text: str) -> str:
    """Return a path as a part of a link's address in Markdown."""
    return quote(text, safe="/", errors="surrogateescape")


def in_cell(markdown: str) -> str:
    """Return Markdown that stays within its cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(markdown.splitlines()))


def for_shell(words: list[str]) -> str:
    """Join words to a command line, in which control characters are written as bash reads them: ``$'\\n'``."""
    return " ".join(shlex.quote(word) if visible(word) == word else _ansi_c(word) for word in words)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _literal(found: re.Match[str]) -> str:
    return "".join(_ENTITIES.get(character, f"\\{character}") for character in found[0])


def _ansi_c(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(map(_bytes_of, escaped))}'"


def _bytes_of(character: str) -> str:
    """Escape a hidden character as bash reads it anywhere; the bytes of a path that are no UTF-8 become bytes again."""
    if not _is_hidden(character):
        return character
    if character.isascii():
        return _escape(character)
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors=errors))
