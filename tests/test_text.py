"""Test that names are text for matplotlib, Markdown, a shell and the terminal, whatever characters are in them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from amp_plugin.text import (
    for_matplotlib,
    for_shell,
    for_terminal,
    in_address,
    in_cell,
    in_code,
    in_fence,
    in_markdown,
    print_all_characters,
    tell,
    visible,
)

NASTY = [
    *(
        "$x^$",
        r"$\frac{$",
        "$",
        "a$b$c",
        r"\$5",
        "stem|head",
        r"a\|b",
        "|",
        "`",
        "``a`",
        "\\",
        "a\\",
        "a_b",
        "__init__",
    ),
    *("<b>x</b>", "<!-- x", "&lt;", "&", "*a*", "_a_", "~~a~~", "[a](b)", "![a](b)", "# C #", "a\nb", "a\r\n\n---\nb"),
    *(
        "\x1b[31mred\x1b[0m",
        "\x00",
        "\t",
        "\x85",
        "\u2028",
        "\u202eabc",
        "\u200f",
        "😀",
        "👩\u200d🚀",
        "名前",
        "\udc80",
    ),
    *("", "x" * 999),
]
_TEXTS = st.one_of(st.text(st.characters(), max_size=12), st.text("$\\|`*_<>&[]()~#!a \n\x1b\u202e", max_size=12))
few = settings(max_examples=60, deadline=None, derandomize=True)
markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def each_nasty(test: Any) -> Any:
    for text in NASTY:
        test = example(text)(test)
    return few(given(_TEXTS)(test))


def rendered(inline: Any) -> str:
    """Return what a reader sees of a paragraph or a cell, and fail on markup other than code."""
    pieces = [token for token in inline.children or [] if token.content not in ("<code>", "</code>")]
    assert {token.type for token in pieces} <= {"text", "code_inline", "text_special"}
    return "".join(token.content for token in pieces)


def cells_of(row: str) -> list[str]:
    """Return the text in the cells of a table's only row."""
    tokens = markdown.parse(f"| a | b | c |\n| --- | --- | --- |\n{row}\n\nafter\n")
    assert [t.type for t in tokens].count("tr_open") == 2
    assert tokens[-2].content == "after"
    return [rendered(token) for token in tokens if token.type == "inline"][3:-1]


@each_nasty
def test_the_visible_has_no_control_characters_and_keeps_the_rest(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c") & set(shown)
    assert [c for c in text if c.isprintable()] == [c for c in text if visible(c) == c and c.isprintable()]


def test_joiners_stay_within_emoji() -> None:
    assert visible("👩\u200d🚀") == "👩\u200d🚀"


@each_nasty
def test_matplotlib_draws_it_without_mathematics(text: str) -> None:
    drawn = Figure().text(0, 0, for_matplotlib(text))
    shown, is_math = drawn._preprocess_math(drawn.get_text())
    assert (shown.removeprefix("\u200b"), is_math) == (visible(text).removeprefix("\u200b"), False)


@pytest.mark.parametrize("text", ["", "_hidden", "__"])
def test_a_legend_has_every_label(text: str) -> None:
    axes = Figure().add_subplot()
    axes.plot([0], [0], label=for_matplotlib(text))
    assert len(axes.get_legend_handles_labels()[1]) == 1


def test_a_long_text_is_cut_before_it_is_escaped() -> None:
    assert for_matplotlib("a" + "$" * 30, 5) == r"a\$\$\$…"


@each_nasty
def test_markdown_shows_it_literally(text: str) -> None:
    words = visible(text).split()
    heading = markdown.parse(f"# {in_markdown(text)}\n\nafter")
    assert rendered(heading[1]).split() == words
    assert [token.type for token in heading] == [
        *("heading_open", "inline", "heading_close", "paragraph_open", "inline", "paragraph_close")
    ]
    first, middle, last = cells_of(f"| x | {in_markdown(text)} | y |")
    assert (first, middle.split(), last) == ("x", words, "y")


@each_nasty
def test_code_in_a_table_shows_it_literally(text: str) -> None:
    first, middle, last = cells_of(f"| x | {in_code(text)} | y |")
    assert (first, middle.split(), last) == ("x", visible(text).split(), "y")


@each_nasty
def test_a_cell_of_any_markdown_is_one_cell(text: str) -> None:
    tokens = markdown.parse(f"| a | b | c |\n| --- | --- | --- |\n| x | {in_cell(text)} | y |\n")
    assert [token.content for token in tokens if token.type == "inline"][-1] == "y"


@each_nasty
def test_a_block_of_code_ends_where_the_text_ends(text: str) -> None:
    fence, *_, inline, _ = markdown.parse(f"{in_fence(for_shell([text]), 'bash')}\n\nafter")
    assert (fence.type, fence.content, inline.content) == ("fence", f"{for_shell([text])}\n", "after")


@each_nasty
def test_an_address_ends_no_link(text: str) -> None:
    (link, *_) = markdown.parse(f"[a](https://x.org/{in_address(text)})")[1].children or []
    assert link.type == "link_open"


def test_a_shell_reads_the_words_again() -> None:
    words = [text for text in NASTY if "\x00" not in text]
    command = f"printf '%s\\0' {for_shell(words)}"
    printed = subprocess.run(["bash", "-c", command], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True).stdout
    assert printed.decode(errors="surrogateescape").split("\0")[:-1] == words
    assert visible(command) == command


def test_a_terminal_gets_lines_without_commands(capsys: pytest.CaptureFixture[str]) -> None:
    tell("first\nse\x1b[2Jcond\r\u202e")
    assert capsys.readouterr().out == "first\nse\\x1b[2Jcond\\r\\u202e\n"
    assert for_terminal(ValueError("a\x07")) == "a\\x07"


def test_an_ascii_terminal_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    print_all_characters()
    tell("é 😀 \udc80")
    assert terminal.buffer.getvalue() == rb"\xe9 \U0001f600 \udc80" + os.linesep.encode()  # type: ignore[attr-defined]


def test_a_stdout_that_is_no_file_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    print_all_characters()
