"""What the README and the guides show a reader to run: their Python snippets and their shell commands.

A snippet of a guide needs the page's first one, which sets up what it uses, and nothing else. One whose first line is
the name of a file is a script, complete by itself. Code of other libraries is fenced as ``python theirs``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from repository import ROOT

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "recipes" / "guides").glob("*.md"))
# Pages whose snippets take for granted what a reader has: a model, a batch, a data set, an optimizer, a finished run.
BARE = [README, *(page for page in GUIDES if page.name in ("MAIN_JOB.md", "FLATNESS.md"))]

_FENCE = re.compile(r"^```(?P<language>[^\n]+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_SCRIPT = re.compile(r"# (\w+\.py)\n")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: the file it stands in.
        line: of its first line of code.
        language: what stands after the fence.
        code: its text.
    """

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def script(self) -> str | None:
        """The file that a reader shall save it as, if it is a script."""
        named = _SCRIPT.match(self.code)
        return named and named[1]

    def compiled(self) -> object:
        """Its code, such that a traceback shows the page's lines."""
        return compile("\n" * (self.line - 1) + self.code, self.page, "exec")

    def commands(self) -> list[list[str]]:
        """The words of its shell commands, without what only prepares an environment."""
        lines = self.code.replace("\\\n", " ").replace("&&", "\n").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [w for w in words if w and not _prepares(w)]


def blocks(page: Path, language: str = "python") -> list[Block]:
    """Those of one language, in their order."""
    text = page.read_text()
    found = _FENCE.finditer(text)
    return [
        Block(page, text.count("\n", 0, m.start("code")) + 1, m["language"], m["code"])
        for m in found
        if m["language"] == language
    ]


def setup(block: Block) -> Block | None:
    """The snippet that has to run before this one; those of bare pages, being short, are set up by the test."""
    if block.page in BARE or block.script:
        return None
    first = next(b for b in blocks(block.page) if not b.script)
    return None if block == first else first


def _prepares(words: list[str]) -> bool:
    return words[0].endswith("pip") or words[1:3] in (["-m", "venv"], ["-m", "pytest"]) or words[0] == "cd"
